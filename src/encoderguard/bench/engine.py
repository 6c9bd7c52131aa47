"""Runs the cells of a plan that are not in the store yet, on a backend: worker processes here, or Ray."""

import contextlib
import heapq
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store, title
from encoderguard.run import Progress, Stopped, StopSignal

__all__ = ["ATTEMPTS", "Backend", "Outcome", "run_cells"]

ATTEMPTS = 3
"""Of a cell whose worker died (out of memory, killed); a cell that fails by itself is not tried again."""


@dataclass
class Outcome:
    """What became of the cells."""

    computed: list[Cell] = field(default_factory=list)
    kept: list[Cell] = field(default_factory=list)
    """They were in the store already."""
    failed: dict[Cell, str] = field(default_factory=dict)
    """One sentence each; cells that need a failed one are failed too."""
    lost: list[Cell] = field(default_factory=list)
    """Once for each time that the worker of a cell died."""
    quarantined: list[str] = field(default_factory=list)


class Backend(Protocol):
    """Computes cells somewhere."""

    at_once: int
    """Cells that are submitted at the same time."""

    def submit(self, cell: Cell) -> Any:
        """A handle for ``finished``."""

    def finished(self, handles: Iterable[Any], seconds: float) -> list[tuple[Any, str | None, bool]]:
        """Those done within ``seconds``: handle, the sentence of its error or None, was the worker lost."""

    def close(self) -> None:
        """Stop all workers."""


def run_cells(
    cells: list[Cell], store: Store, make: Callable[[], Backend], *, progress: Progress, stop: StopSignal
) -> Outcome:
    """Compute what is missing, each cell after what it needs.

    Args:
        cells: each once, with all that they need, as ``Plan.cells`` gives them.
        store: where they are kept.
        make: makes the backend, if there is anything to compute at all.
        progress: shown as cells finish.
        stop: looked at between cells; running cells are then ended, and resume from their checkpoints.

    Raises:
        Stopped: the user asked to stop.
    """
    outcome = Outcome(kept=[cell for cell in cells if store.done(cell)])
    outcome.quarantined = list(store.quarantined)
    schedule = _Schedule(cells, outcome)
    if not schedule.ready:
        return outcome
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of workers that died
        _work_off(schedule, make, len(cells), progress, stop)
    return outcome


def _work_off(
    schedule: "_Schedule", make: Callable[[], Backend], total: int, progress: Progress, stop: StopSignal
) -> None:
    backend, running, outcome = make(), dict[Any, Cell](), schedule.outcome
    try:
        while schedule.ready or running:
            if stop.requested:
                raise Stopped
            while len(running) < backend.at_once and (cell := schedule.next()) is not None:
                running[backend.submit(cell)] = cell
            for handle, error, lost in backend.finished(list(running), 0.5):
                schedule.end(running.pop(handle), error, lost=lost)
                done = len(outcome.kept) + len(outcome.computed) + len(outcome.failed)
                progress("bench", done, total, f"{len(outcome.failed)} failed")
    finally:
        backend.close()


class _Schedule:
    """Which cell is next: of those that have what they need, the one that most others wait for in a row.

    Of two alike the first in the order given. A chain begun last would leave the other workers idle.
    """

    def __init__(self, cells: list[Cell], outcome: Outcome) -> None:
        done = set(outcome.kept)
        left = [cell for cell in cells if cell not in done]
        self.outcome, self.order = outcome, {cell: number for number, cell in enumerate(left)}
        self.chain = _chains(left)
        self.lost: dict[Cell, int] = {}
        self.lacks: dict[Cell, int] = {}
        """How many of the cells that it needs are not there yet."""
        self.waiting: dict[Cell, list[Cell]] = {}
        """By cell: those that need it."""
        self.ready: list[tuple[int, int, Cell]] = []
        for cell in left:
            needed = set(cell.needs.values()) - done
            self.lacks[cell] = len(needed)
            for other in needed:
                self.waiting.setdefault(other, []).append(cell)
            if not needed:
                self._release(cell)

    def next(self) -> Cell | None:
        """A cell that can be computed now."""
        return heapq.heappop(self.ready)[-1] if self.ready else None

    def end(self, cell: Cell, error: str | None, *, lost: bool) -> None:
        """Take note of what became of a cell that ``next`` gave."""
        if error is None:
            self.outcome.computed.append(cell)
            for other in self.waiting.get(cell, ()):
                self.lacks[other] -= 1
                if self.lacks[other] == 0:
                    self._release(other)
            return
        if lost:
            self.outcome.lost.append(cell)
            self.lost[cell] = self.lost.get(cell, 0) + 1
            if self.lost[cell] < ATTEMPTS:
                return self._release(cell)
            error = f"{title(cell)}: {error}, in each of {ATTEMPTS} attempts."
        self._fail(cell, error)

    def _release(self, cell: Cell) -> None:
        heapq.heappush(self.ready, (-self.chain[cell], self.order[cell], cell))

    def _fail(self, cell: Cell, reason: str) -> None:
        if cell in self.outcome.failed:
            return
        self.outcome.failed[cell] = reason
        for other in self.waiting.get(cell, ()):
            self._fail(other, reason if reason.startswith("needs ") else f"needs {reason}")


def _chains(cells: list[Cell]) -> dict[Cell, int]:
    """By cell, the longest chain of cells that wait for it; what a cell needs comes before it."""
    chain = dict.fromkeys(cells, 0)
    for cell in reversed(cells):
        for other in cell.needs.values():
            if other in chain:
                chain[other] = max(chain[other], chain[cell] + 1)
    return chain
