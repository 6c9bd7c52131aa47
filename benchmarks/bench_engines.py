"""What workers and engines do to a grid of cells: time, records, and the cost of a worker that is killed.

Every part computes the same cells into a store of its own, so nothing is taken from another part. The digits
need no download. All parts run in one call, one after another. Seconds are of the wall clock, from the first
cell submitted to the last one finished, so that Ray's own start is told apart. On a machine that does other
work too, two workers gain less than they would.

    python benchmarks/bench_engines.py
    python benchmarks/bench_engines.py --epochs 4 --seeds 1 --parts local kill
"""

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encoderguard.bench.cells import Places, open_images
from encoderguard.bench.engine import Backend, Outcome, run_cells
from encoderguard.bench.outcome import comparable
from encoderguard.bench.plan import Cell
from encoderguard.bench.planner import make_plan
from encoderguard.bench.run import EngineName, backend
from encoderguard.bench.store import Store
from encoderguard.bench.suite import Choice, Size, Suite, Task
from encoderguard.provenance import source_facts
from encoderguard.run import StopSignal
from encoderguard.storage import write_text

RESULTS = Path(__file__).parent / "results"
PLACES = Places(device="cpu")
TARGET = 0.6
"""Share of one worker's time that two may take."""


def cells(seeds: int, epochs: int) -> list[Cell]:
    """A tiny grid: encoders, attacks, scans, a defense, evaluations."""
    suite = Suite(
        name="engines",
        title="A grid to time",
        paper="none",
        item="none",
        expected="Nothing.",
        defenses=(Choice(name="none"), Choice(name="mimic")),
        detectors=(Choice(name="decree"),),
    )
    size = Size(
        images="digits:train",
        auxiliary="digits:test",
        own_task="digits",
        width=4,
        pretrain_count=600,
        shadow_count=300,
        clean_count=150,
        scan_count=100,
        seeds=tuple(range(seeds)),
        tasks=(Task(name="digits", train="digits:train", test="digits:test", target=0),),
        settings={
            "pretrain.simclr": {"epochs": epochs, "batch_size": 100},
            "attack.badencoder": {"epochs": epochs, "batch_size": 100, "trigger_size": 8},
            "defense.mimic": {"epochs": epochs, "batch_size": 50},
            "detector.decree": {"max_steps": 20},
        },
    )
    return make_plan(suite, size, "engines", digest=lambda spec: open_images(spec, PLACES).digest).cells()


class Clock:
    """A backend that notes when it was ready and when it was done with."""

    def __init__(self, inner: Backend) -> None:
        self._inner, self.at_once, self.began = inner, inner.at_once, time.monotonic()
        self.seconds = 0.0

    def submit(self, cell: Cell) -> Any:
        return self._inner.submit(cell)

    def finished(self, handles: Any, seconds: float) -> list[tuple[Any, str | None, bool]]:
        found = self._inner.finished(handles, seconds)
        self.seconds = time.monotonic() - self.began
        return found

    def close(self) -> None:
        self._inner.close()


def timed(todo: list[Cell], store: Store, make: Callable[[], Backend]) -> tuple[dict[str, Any], Outcome]:
    """Compute all cells; how long it took, with and without the engine's start and end."""
    clocks: list[Clock] = []

    def clock() -> Backend:
        clocks.append(Clock(make()))
        return clocks[-1]

    began, load = time.monotonic(), os.getloadavg()[0]
    outcome = run_cells(todo, store, clock, progress=lambda *_: None, stop=StopSignal())
    whole = time.monotonic() - began
    if outcome.failed:
        raise SystemExit("\n".join(outcome.failed.values()))
    return {"seconds": clocks[0].seconds, "with_start_and_end": whole, "load_before": load}, outcome


def records(store: Store, todo: list[Cell]) -> dict[str, Any]:
    return {cell.key: comparable(store.facts(cell)["record"]) for cell in todo}


@contextmanager
def killing(store: Store, cell: Cell) -> Iterator[None]:
    """Kill the worker of ``cell`` half a second after it has begun."""

    def wait() -> None:
        lock = store.root / "locks" / cell.key
        while not over.is_set():
            try:
                number = int(lock.read_text().split()[0])
            except (OSError, IndexError):
                over.wait(0.01)
                continue
            over.wait(0.5)
            os.kill(number, signal.SIGKILL)
            return

    over = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def engine_part(name: EngineName, todo: list[Cell], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One worker against two of an engine; gives the records of two as well."""
    found: dict[str, Any] = {}
    held = []
    for workers in (1, 2):
        store = Store(folder / f"{name}{workers}")
        found[f"workers_{workers}"], _ = timed(todo, store, backend(name, store, PLACES, workers=workers))
        held.append(records(store, todo))
        print(f"{name}, {workers} worker(s): {found[f'workers_{workers}']['seconds']:.1f} s", flush=True)
    found["share"] = found["workers_2"]["seconds"] / found["workers_1"]["seconds"]
    found["target"], found["reached"] = TARGET, found["share"] <= TARGET
    found["records_equal"] = held[0] == held[1]
    return found, held[1]


def kill_part(name: EngineName, todo: list[Cell], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two workers, one of which is killed as it attacks."""
    store = Store(folder / f"{name}-kill")
    victim = next(cell for cell in todo if cell.job == "attack")
    with killing(store, victim):
        seconds, outcome = timed(todo, store, backend(name, store, PLACES, workers=2))
    again = len(outcome.lost)
    print(f"{name}, a worker killed: {again} cell(s) computed again", flush=True)
    return {**seconds, "computed_again": again, "cells": len(outcome.computed)}, records(store, todo)


def main() -> None:
    """Measure, print a line for each part, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="each is a grid of its own: seven cells")
    parser.add_argument("--epochs", type=int, default=20, help="of every training")
    parser.add_argument(
        "--parts", nargs="+", choices=["local", "ray", "kill"], default=["local", "ray", "kill"]
    )
    parser.add_argument("--folder", type=Path, help="for the stores; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_engines.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread each, or the records of one and two may differ
    todo = cells(options.seeds, options.epochs)
    engines: list[EngineName] = [name for name in ("local", "ray") if name in options.parts]
    record: dict[str, Any] = {
        "format": "encoderguard.benchmark/1",
        "benchmark": "bench_engines",
        "command": f"python benchmarks/bench_engines.py --seeds {options.seeds} --epochs {options.epochs} "
        f"--parts {' '.join(options.parts)}",
        "cells": len(todo),
        "cores": os.cpu_count(),
        "threads_each": os.environ["OMP_NUM_THREADS"],
        **source_facts(),
    }
    held = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in engines:
            record[name], found = engine_part(name, todo, folder)
            held.append(found)
        for name in (engines or ["local"]) if "kill" in options.parts else []:
            record[f"{name}_killed"], found = kill_part(name, todo, folder)
            held.append(found)
    record["records_equal_everywhere"] = all(found == held[0] for found in held)
    print(f"Records equal everywhere: {record['records_equal_everywhere']}")
    if "ray" in engines:
        import ray

        record["versions"]["ray"] = ray.__version__
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
