"""The store of a bench when the disk is full, files are broken, or somebody else computes the same cell."""

import errno
import json
import resource
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from encoderguard import storage
from encoderguard.bench import computing
from encoderguard.bench import run as bench_run
from encoderguard.bench.cells import Places
from encoderguard.bench.computing import compute
from encoderguard.bench.engine import Outcome, run_cells
from encoderguard.bench.local import attempt
from encoderguard.bench.plan import Cell
from encoderguard.bench.run import plans, run_bench
from encoderguard.bench.store import Store
from encoderguard.errors import OutputError, RunError, StorageError
from encoderguard.run import StopSignal
from encoderguard.storage import write_atomic
from tests.bench_toys import records_in, toy_files

PLACES = Places(device="cpu")


class Here:
    """A backend without processes."""

    at_once = 1

    def __init__(self, store: Store) -> None:
        self.store = store

    def submit(self, cell: Cell) -> Cell:
        return cell

    def finished(self, handles: Iterable[Cell], seconds: float) -> list[tuple[Cell, str | None, bool]]:
        return [(cell, attempt(cell, self.store.root, PLACES), False) for cell in handles]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """A clean encoder and its scan."""
    suite, size = toy_files(tmp_path_factory.mktemp("files"))
    planned = plans([str(suite)], str(size), PLACES)[0].cells()
    clean = next(cell for cell in planned if cell.job == "pretrain")
    return [clean, next(c for c in planned if c.job == "scan" and clean in c.needs.values())]


@pytest.fixture(scope="module")
def finished(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    assert run(cells, folder).failed == {}
    return folder


def run(cells: list[Cell], folder: Path) -> Outcome:
    store = Store(folder)
    return run_cells(cells, store, lambda: Here(store), progress=lambda *_: None, stop=StopSignal())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk does, this makes the system refuse what any library writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def nothing_is_left(folder: Path) -> None:
    """Not a file of an unfinished cell, and nobody holds one."""
    unfinished = [f for f in folder.glob("cells/*/*") if not (f / "cell.json").exists()]
    assert unfinished == []
    assert not list(folder.rglob("*.part"))
    assert not list(folder.glob("locks/*"))


# --- full disks -----------------------------------------------------------------------------------


def test_a_full_disk_while_an_encoder_is_written(
    cells: list[Cell], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, size = toy_files(tmp_path)
    monkeypatch.setattr(bench_run, "Local", lambda store, places, *, workers: Here(store))
    with largest_file(20_000), pytest.raises(RunError) as caught:
        run_bench([str(suite)], size=str(size), out=tmp_path / "out", places=PLACES)
    assert caught.value.exit_code == 2
    first = r"cells failed; the first: pretrain simclr \(seed 0\): Could not store .*: File too large\. "
    assert caught.match(first)
    nothing_is_left(tmp_path / "out" / "store")
    assert run(cells, tmp_path / "out" / "store").failed == {}
    assert records_in(tmp_path / "out" / "store") == records_in(finished)


def no_space(part: Path, text: str) -> None:
    part.write_text(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device", str(part))


def test_a_full_disk_while_cell_json_is_written(
    cells: list[Cell], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage._fill

    def fill(part: Path, text: str) -> None:
        (no_space if "cell.json" in part.name else write)(part, text)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_fill", fill)
        outcome = run(cells, tmp_path)
    assert "No space left on device" in outcome.failed[cells[0]]
    assert outcome.failed[cells[1]].startswith("needs pretrain simclr (seed 0): Could not store ")
    nothing_is_left(tmp_path)
    assert run(cells, tmp_path).failed == {}
    assert records_in(tmp_path) == records_in(finished)


def test_a_full_disk_while_a_finished_scan_is_moved(
    cells: list[Cell], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that it worked in may lie on another disk."""
    shutil.copytree(finished, tmp_path / "store")
    store = Store(tmp_path / "store")
    shutil.rmtree(store.folder(cells[1]))

    def move(source: Path, place: Path) -> None:
        place.mkdir()
        no_space(place / "result.json", "half of it")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", move)
        with pytest.raises(StorageError, match=r"^scan decree \(seed 0\): Could not store .*No space left"):
            compute(cells[1], store, PLACES)
    nothing_is_left(store.root)
    compute(cells[1], store, PLACES)
    assert records_in(store.root) == records_in(finished)


@pytest.mark.parametrize(
    "write",
    [
        lambda part: torch.save({"a": torch.zeros(100_000)}, part),
        lambda part: part.write_bytes(bytes(400_000)),
    ],
    ids=["torch", "plain"],
)
def test_every_writer_is_told_of_a_full_disk(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_text("the last one")
    with largest_file(100_000), pytest.raises(StorageError, match=r"Could not store .*checkpoint\.pt: File "):
        write_atomic(tmp_path / "checkpoint.pt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_text() == "the last one"


def test_an_error_that_is_not_the_disks_stays(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomic(tmp_path / "checkpoint.pt", write)
    assert list(tmp_path.iterdir()) == []


# --- broken cells ---------------------------------------------------------------------------------


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def another_number(path: Path) -> None:
    facts = json.loads(path.read_text())
    facts["record"]["seed"] = 7
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (folder_instead, "its cell.json cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "its cell.json cannot be read (UnicodeDecodeError)"),
        (lambda path: path.write_text("[]"), "its cell.json cannot be read (TypeError)"),
        (lambda path: path.write_text("[" * 100_000), "its cell.json cannot be read (RecursionError)"),
        (another_number, "its cell.json has changed"),
        (lambda path: (path.parent / "arrays.npz").unlink(), "arrays.npz cannot be read (No such file or"),
    ],
)
def test_a_cell_that_cannot_be_read_is_set_aside(
    harm: Callable[[Path], object],
    told: str,
    cells: list[Cell],
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(finished, tmp_path / "store")
    store = Store(tmp_path / "store")
    harm(store.folder(cells[1]) / "cell.json")
    assert [store.done(cell) for cell in cells] == [True, False]
    assert store.quarantined[0].startswith(f"scan decree (seed 0) {cells[1].key[:12]}: {told}")
    place = tmp_path / "store" / "quarantine" / cells[1].key
    assert caplog.messages[0].startswith(f"Set aside in {place}, to be computed again: scan decree (seed 0) ")
    assert (place / "result.json").exists()
    assert not store.folder(cells[1]).exists()


def test_a_cell_without_permission_is_set_aside(
    cells: list[Cell], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "store")
    store = Store(tmp_path / "store")

    def denied(cell: Cell) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "facts", denied)
    assert not store.done(cells[0])
    assert store.quarantined[0].endswith("its cell.json cannot be read (Permission denied)")


def test_a_broken_cell_that_cannot_be_moved(cells: list[Cell], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "store")
    store = Store(tmp_path / "store")
    (store.folder(cells[1]) / "cell.json").write_text("{")
    (tmp_path / "store" / "quarantine").write_text("not a folder")
    with pytest.raises(OutputError, match="quarantine must be a folder"):
        store.done(cells[1])


def test_a_damaged_checkpoint_does_not_stop_a_cell(cells: list[Cell], finished: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.folder(cells[0]).mkdir(parents=True)
    (store.folder(cells[0]) / "checkpoint.pt").write_text("half of")
    (store.folder(cells[0]) / ".checkpoint.pt.17.part").write_text("half of the next")
    compute(cells[0], store, PLACES)
    names = sorted(path.name for path in store.folder(cells[0]).iterdir())
    assert names == sorted(path.name for path in Store(finished).folder(cells[0]).iterdir())
    record = records_in(tmp_path)[cells[0].key]
    assert record == records_in(finished)[cells[0].key]


# --- two at once ----------------------------------------------------------------------------------


def test_one_waits_for_the_other(cells: list[Cell], tmp_path: Path) -> None:
    stores, seen, inside = [Store(tmp_path) for _ in range(4)], list[str](), threading.Event()

    def work(store: Store) -> None:
        with store.claim(cells[0]):
            seen.append("in")
            inside.set()
            assert not threading.Event().wait(0.05)
            seen.append("out")

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    assert inside.wait(5)
    for thread in threads:
        thread.join()
    assert seen == ["in", "out"] * 4
    assert list((tmp_path / "locks").iterdir()) == []


def test_what_another_process_finished_is_not_computed(
    cells: list[Cell], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "_compute", lambda *_: pytest.fail("it is there"))
    compute(cells[0], Store(finished), PLACES)
