"""A bench that is killed at random moments ends with the same cells as one that is left alone."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from encoderguard.bench.cells import Places
from encoderguard.bench.engine import run_cells
from encoderguard.bench.local import Local
from encoderguard.bench.run import plans
from encoderguard.bench.store import Store, file_digest
from encoderguard.provenance import source_facts
from encoderguard.run import StopSignal
from tests.bench_toys import records_in, toy_files

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("ENCODERGUARD_KILLS", "50"))
RECORD = os.environ.get("ENCODERGUARD_KILL_RECORD")
"""A file to write what was seen to; none by default."""
EPOCHS = 40
PER_ROUND = 12
"""Kills after which a bench is left to finish, if it did not before; then a new one is begun."""


@dataclass
class Bench:
    """One command, with everything that it writes below ``folder``."""

    folder: Path
    files: tuple[Path, Path]
    phases: Counter[str] = field(default_factory=Counter)
    checkpoints: int = 0
    """Kills that left a checkpoint behind."""

    def start(self, workers: int) -> "subprocess.Popen[bytes]":
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "encoderguard", "bench", "run", str(self.files[0])]
        command += ["--size", str(self.files[1]), "--out", str(self.folder), "--workers", str(workers)]
        surroundings = {"TMPDIR": str(self.folder / "tmp"), "ENCODERGUARD_SAVE_EVERY": "0.05"}
        with (self.folder / "errors").open("ab") as errors:
            return subprocess.Popen(
                command,
                env=os.environ | surroundings | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.wait(600) == 0, (self.folder / "errors").read_text()

    def kill(self, process: "subprocess.Popen[bytes]", moment: float, *, early: bool) -> bool:
        """Whether it was still there to be killed, with all of its workers, ``moment`` seconds on."""
        if not early:
            self._wait_for_work(process)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._note(early)
            return True
        self.finish(process)
        return False

    def _wait_for_work(self, process: "subprocess.Popen[bytes]") -> None:
        """Until a worker has begun a cell, or the tables are being written."""
        known = self._held()
        while process.poll() is None and self._held() == known and not self._all_done():
            time.sleep(0.05)

    def _held(self) -> dict[str, str]:
        """By cell: the process that computes it, or that was killed as it did."""
        found = {}
        for path in (self.folder / "store" / "locks").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.read_text()
        return {name: text for name, text in found.items() if text}

    def _all_done(self) -> bool:
        return len(list((self.folder / "store").glob("cells/*/*/cell.json"))) == 7

    def _note(self, early: bool) -> None:
        jobs = {path.parent.name for path in self.folder.rglob("resume.json")}
        place = "start-up" if early else "tables" if self._all_done() else "resumable" if jobs else "cell"
        self.phases[place] += 1
        self.checkpoints += any(self.folder.rglob("checkpoint*.pt"))

    def check_whole(self) -> int:
        """Every finished cell has all of its files, as they were written; gives their number."""
        cells = list((self.folder / "store").glob("cells/*/*/cell.json"))
        for path in cells:
            for name, digest in json.loads(path.read_text())["files"].items():
                assert file_digest(path.parent / name) == digest
        return len(cells)

    def check_clean(self) -> None:
        """Nothing half-written, nothing set aside, nothing left of the killed runs."""
        store = self.folder / "store"
        assert sorted(path.name for path in store.iterdir() if path.name[0] != ".") == ["cells", "locks"]
        assert list((store / "locks").iterdir()) == []
        assert not [path for path in self.folder.rglob("*.part")]
        assert not [path for path in store.rglob("*") if path.name.startswith(("checkpoint", "resume"))]
        assert not list((self.folder / "tmp").glob("encoderguard-*"))
        assert self.check_whole() == len(list(store.glob("cells/*/*"))) == 7

    def table(self) -> list[dict[str, Any]]:
        """The rows, less what differs between two runs."""
        rows = json.loads((self.folder / "toy-toys" / "bench.json").read_text())["rows"]
        timed = ("seconds", "memory")
        return [r | {"values": {k: v for k, v in r["values"].items() if k not in timed}} for r in rows]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    files, rng = toy_files(tmp_path, epochs=EPOCHS), random.Random(0)
    whole = Bench(tmp_path / "whole", files)
    process = whole.start(1)
    whole._wait_for_work(process)
    began = time.monotonic()
    whole.finish(process)
    span = time.monotonic() - began  # of the work alone, without the start
    whole.check_clean()
    expected, table = records_in(whole.folder / "store"), whole.table()
    assert len(expected) == 7

    killed, rounds, phases, checkpoints, lost = 0, 0, Counter[str](), 0, 0
    while killed < KILLS:
        bench, here, before = Bench(tmp_path / f"round{rounds}", files), 0, 0
        while here < PER_ROUND and killed < KILLS:
            process = bench.start(2 if killed % 5 == 4 else 1)
            early = killed % 10 == 9
            if not bench.kill(process, rng.uniform(0, span / 8), early=early):
                break
            here, killed = here + 1, killed + 1
            now = bench.check_whole()
            lost += max(0, before - now)
            before = now
        else:
            bench.finish(bench.start(1))
        bench.check_clean()
        assert records_in(bench.folder / "store") == expected
        assert bench.table() == table
        rounds, phases, checkpoints = rounds + 1, phases + bench.phases, checkpoints + bench.checkpoints
    assert lost == 0
    if RECORD:
        seen = {"kills": killed, "rounds": rounds, "killed_in": dict(phases), "with_checkpoint": checkpoints}
        _write(Path(RECORD), seen | {"seconds_of_an_unbroken_run": span})


def _write(path: Path, seen: dict[str, Any]) -> None:
    facts = {
        "format": "encoderguard.benchmark/1",
        "benchmark": "bench_kill",
        "command": f"ENCODERGUARD_KILL_RECORD={path} pytest -m slow tests/test_bench_kill.py -k moments",
        "what": "SIGKILL of the process group of 'encoderguard bench run'; the same command again after each",
        "cells_of_a_bench": 7,
        "cells_lost": 0,
        "cells_duplicated": 0,
        "half_written": 0,
        "records_equal_to_an_unbroken_run": True,
        **seen,
        **source_facts(),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")


def test_a_killed_worker_costs_only_its_cell(tmp_path: Path) -> None:
    suite, size = toy_files(tmp_path)
    places, store = Places(device="cpu"), Store(tmp_path / "store")
    todo = plans([str(suite)], str(size), places)[0].cells()
    victim = next(cell for cell in todo if cell.job == "attack")
    killer = threading.Thread(target=_kill_worker_of, args=(store.root / "locks" / victim.key,))
    killer.start()
    outcome = run_cells(
        todo,
        store,
        lambda: Local(store, places, workers=2),
        progress=lambda *_: None,
        stop=StopSignal(),
    )
    killer.join()
    assert (outcome.failed, outcome.lost) == ({}, [victim])
    assert sorted(cell.key for cell in outcome.computed) == sorted(cell.key for cell in todo)


def _kill_worker_of(lock: Path) -> None:
    """As soon as it has begun the cell."""
    for _ in range(60_000):
        with contextlib.suppress(FileNotFoundError):
            if text := lock.read_text():
                return os.kill(int(text.split()[0]), signal.SIGKILL)
        time.sleep(0.01)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Else they would compute the same cells as those of the next run."""
    bench = Bench(tmp_path / "bench", toy_files(tmp_path, epochs=4000))
    process = bench.start(1)
    bench._wait_for_work(process)
    (text,) = bench._held().values()
    worker = int(text.split()[0])
    assert worker != process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(1000):
        if not _alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


def _alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie that nobody waits for
