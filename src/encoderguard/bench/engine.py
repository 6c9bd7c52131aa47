"""Runs the cells of a plan that are not in the store yet: here in worker processes, or on Ray."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from encoderguard.bench.cells import Places, compute, single_threaded
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store
from encoderguard.run import Progress, Stopped, StopSignal

__all__ = ["Backend", "Local", "Outcome", "run_cells"]

_ATTEMPTS = 3
"""Of a cell whose worker died (out of memory, killed); a cell that fails by itself is not tried again."""


@dataclass
class Outcome:
    """What became of the cells."""

    computed: list[Cell] = field(default_factory=list)
    kept: list[Cell] = field(default_factory=list)
    """They were in the store already."""
    failed: dict[Cell, str] = field(default_factory=dict)
    """One sentence each; cells that need a failed one are failed too."""
    quarantined: list[str] = field(default_factory=list)


class Backend(Protocol):
    """Computes cells somewhere."""

    def submit(self, cell: Cell) -> Any:
        """A handle for ``finished``."""

    def finished(self, handles: Iterable[Any], seconds: float) -> list[tuple[Any, str | None, bool]]:
        """Those done within ``seconds``: handle, the sentence of its error or None, was the worker lost."""

    def close(self) -> None:
        """Stop all workers."""


class Local:
    """A pool of worker processes on this machine; one cell each at a time."""

    def __init__(self, store: Store, places: Places, *, workers: int) -> None:
        self.store, self.places, self.workers = store, places, workers
        given = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // workers)
        self._pool = self._made()

    def _made(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        return ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=partial(_prepare, self.threads)
        )

    def submit(self, cell: Cell) -> Future[str | None]:
        """See Backend."""
        try:
            return self._pool.submit(attempt, cell, self.store.root, self.places)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._made()
            return self._pool.submit(attempt, cell, self.store.root, self.places)

    def finished(
        self, handles: Iterable[Future[str | None]], seconds: float
    ) -> list[tuple[Future[str | None], str | None, bool]]:
        """See Backend."""
        done, _ = wait(list(handles), timeout=seconds, return_when=FIRST_COMPLETED)
        found = []
        for handle in done:
            try:
                found.append((handle, handle.result(), False))
            except BrokenProcessPool:
                found.append((handle, "its worker process died", True))
        return found

    def close(self) -> None:
        """See Backend."""
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _prepare(threads: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
    single_threaded(threads)


def attempt(cell: Cell, root: Any, places: Places) -> str | None:
    """Compute a cell in a worker: None, or the sentence that says why not."""
    import contextlib

    from encoderguard.errors import EncoderGuardError

    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            compute(cell, Store(root), places)
    except EncoderGuardError as error:
        return str(error)
    except Exception as error:  # a bug in one method must not end the grid
        return f"{cell.job} {cell.method} (seed {cell.seed}): {type(error).__name__}: {error}"
    return None


def run_cells(
    cells: list[Cell],
    store: Store,
    make: Callable[[], Backend],
    *,
    progress: Progress,
    stop: StopSignal,
    at_once: int = 2,
) -> Outcome:
    """Compute what is missing, each cell after what it needs.

    Args:
        cells: each after what it needs, as ``Plan.cells`` gives them.
        store: where they are kept.
        make: makes the backend, if there is anything to compute at all.
        progress: shown as cells finish.
        stop: looked at between cells; running cells are then ended, and resume from their checkpoints.
        at_once: cells that are submitted at the same time.

    Raises:
        Stopped: the user asked to stop.
    """
    outcome = Outcome(kept=[cell for cell in cells if store.done(cell)])
    outcome.quarantined = list(store.quarantined)
    left = [cell for cell in cells if cell not in set(outcome.kept)]
    if not left:
        return outcome
    backend, state = make(), _State(left, set(outcome.kept), outcome)
    try:
        while state.waiting or state.running:
            if stop.requested:
                raise Stopped
            while len(state.running) < at_once and (cell := state.next()) is not None:
                state.running[backend.submit(cell)] = cell
            for handle, error, lost in backend.finished(list(state.running), 0.5):
                state.end(handle, error, lost=lost)
                done = len(cells) - len(state.waiting) - len(state.running)
                progress("bench", done, len(cells), f"{len(outcome.failed)} failed")
    finally:
        backend.close()
    return outcome


class _State:
    def __init__(self, waiting: list[Cell], done: set[Cell], outcome: Outcome) -> None:
        self.waiting, self.done, self.outcome = waiting, done, outcome
        self.running: dict[Any, Cell] = {}
        self.lost: dict[Cell, int] = {}
        self.began = time.monotonic()

    def next(self) -> Cell | None:
        """A cell that has what it needs; those that never will are failed on the way."""
        for cell in list(self.waiting):
            needed = list(cell.needs.values())
            if broken := next((n for n in needed if n in self.outcome.failed), None):
                self.waiting.remove(cell)
                reason = self.outcome.failed[broken]
                self.outcome.failed[cell] = reason if reason.startswith("needs ") else f"needs {reason}"
            elif all(n in self.done for n in needed):
                self.waiting.remove(cell)
                return cell
        return None

    def end(self, handle: Any, error: str | None, *, lost: bool) -> None:
        cell = self.running.pop(handle)
        if error is None:
            self.done.add(cell)
            self.outcome.computed.append(cell)
            return
        if lost:
            self.lost[cell] = self.lost.get(cell, 0) + 1
            if self.lost[cell] < _ATTEMPTS:
                self.waiting.insert(0, cell)
                return
        self.outcome.failed[cell] = error
