"""The benchmark on a local Ray cluster of two workers, against the same cells computed in this process."""

import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encoderguard.bench.cells import Places
from encoderguard.bench.engine import Outcome, run_cells
from encoderguard.bench.local import attempt
from encoderguard.bench.plan import Cell
from encoderguard.bench.run import plans, run_bench
from encoderguard.bench.store import Store
from encoderguard.errors import SettingError
from encoderguard.run import Stopped, StopSignal
from tests.bench_toys import records_in, toy_files

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'encoderguard[ray]'", allow_module_level=True)
from encoderguard.bench.on_ray import OnRay

# Ray's own: files and sockets that it leaves to the garbage collector, options it announces
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PLACES = Places(device="cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all tests that do not start their own."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()


def cells(folder: Path, *, epochs: int = 2) -> list[Cell]:
    suite, size = toy_files(folder, epochs=epochs)
    return plans([str(suite)], str(size), PLACES)[0].cells()


def on_ray(todo: list[Cell], folder: Path, stop: StopSignal | None = None) -> Outcome:
    store = Store(folder)
    return run_cells(
        todo,
        store,
        lambda: OnRay(store, PLACES, workers=2),
        progress=lambda *_: None,
        stop=stop or StopSignal(),
    )


def test_records_are_those_of_the_local_engine(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = cells(tmp_path)
    for cell in todo:
        assert attempt(cell, tmp_path / "here", PLACES) is None
    monkeypatch.chdir(tmp_path)
    outcome = on_ray(todo, Path("there"))  # a relative path means the same to a worker
    assert (outcome.failed, outcome.lost, len(outcome.computed)) == ({}, [], len(todo))
    assert records_in(tmp_path / "there") == records_in(tmp_path / "here")
    assert on_ray(todo, Path("there")).computed == []


def kill_worker_of(cell: Cell, folder: Path, killed: list[int]) -> None:
    """As soon as it has begun."""
    lock = folder / "locks" / cell.key
    for _ in range(6000):
        if lock.exists() and (text := lock.read_text()):
            killed.append(int(text.split()[0]))
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.01)


def test_a_killed_worker_costs_only_its_cell(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = cells(tmp_path)
    victim = next(cell for cell in todo if cell.job == "attack")
    killed: list[int] = []
    killer = threading.Thread(target=kill_worker_of, args=(victim, tmp_path / "store", killed))
    killer.start()
    outcome = on_ray(todo, tmp_path / "store")
    killer.join()
    assert (outcome.failed, outcome.lost, len(killed)) == ({}, [victim], 1)
    assert sorted(cell.key for cell in outcome.computed) == sorted(cell.key for cell in todo)
    assert list((tmp_path / "store" / "locks").iterdir()) == []
    assert capsys.readouterr().out == ""  # results alone; what Ray tells goes to standard error


def test_a_cell_that_fails_is_told_and_not_tried_again(cluster: None, tmp_path: Path) -> None:
    broken = Cell(
        job="pretrain",
        method="simclr",
        settings={"epochs": -1},
        seed=0,
        data={"images": "digits:train"},
        extra={
            "count": 64,
            "image_size": None,
            "architecture": "resnet18",
            "width": 2,
            "stem": "cifar",
            "normalisation": None,
        },
    )
    outcome = on_ray([broken], tmp_path)
    assert outcome.lost == []
    assert outcome.failed[broken].startswith("pretrain simclr (seed 0): ")
    assert "epochs" in outcome.failed[broken]


def test_stopping_leaves_no_cluster_and_the_handlers(tmp_path: Path) -> None:
    """With a cluster of its own, hence the last of those that compute."""
    import ray

    ray.shutdown()
    stop, handlers = StopSignal(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    kept: list[Any] = []

    class Watched(OnRay):
        def submit(self, cell: Cell) -> Any:
            kept.extend(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))
            stop.requested = True
            return super().submit(cell)

    store = Store(tmp_path / "store")
    with pytest.raises(Stopped):
        run_cells(
            cells(tmp_path),
            store,
            lambda: Watched(store, PLACES, workers=1),
            progress=lambda *_: None,
            stop=stop,
        )
    assert kept == handlers
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-1.0, "A cell cannot have -1 accelerators"),
        (1.5, "A cell cannot have 1.5 accelerators; give 0, a share such as 0.25, or a whole number"),
    ],
)
def test_impossible_shares(share: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        OnRay(Store(tmp_path), PLACES, workers=1, accelerators=share)


def test_shares_are_checked_against_the_cluster() -> None:
    from encoderguard.bench.on_ray import _share

    assert _share(None, {"CPU": 4.0}, "auto") == 0
    assert _share(None, {"CPU": 4.0, "GPU": 2.0}, "auto") == 1
    assert _share(None, {"CPU": 4.0, "GPU": 2.0}, "cpu") == 0
    assert _share(0.25, {"CPU": 4.0, "GPU": 2.0}, "auto") == 0.25
    with pytest.raises(SettingError, match=r"A cell asks for 0\.25 accelerators and the Ray cluster has 0; "):
        _share(0.25, {"CPU": 4.0}, "auto")


def test_an_address_where_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(SettingError, match=r"No Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9 \(Conn"):
        OnRay(Store(tmp_path), PLACES, workers=1)


def test_shares_need_ray(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Shares of accelerators need Ray"):
        run_bench(["decree-table1"], out=tmp_path, accelerators=0.25)
