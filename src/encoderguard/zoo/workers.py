"""Cells in processes of their own: one that dies or fails takes no other along."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from encoderguard.errors import EncoderGuardError
from encoderguard.jobs.options import JobOptions
from encoderguard.run import Progress, Stopped, StopSignal
from encoderguard.zoo.cells import Maker, Site
from encoderguard.zoo.entries import failed_entry
from encoderguard.zoo.manifest import Entry
from encoderguard.zoo.recipe import Cell

__all__ = ["Crew", "attempt", "one_thread"]

_PROGRESS_EVERY = 1.0  # seconds between two messages of a worker
_PATIENCE = 60.0  # seconds that a worker gets to stop


def attempt(site: Site, cell: Cell, options: JobOptions) -> Entry:
    """Make a cell; an error becomes an entry. Raises Stopped if the user asked to stop."""
    try:
        return Maker(site, cell, options).make()
    except KeyboardInterrupt:
        raise
    except EncoderGuardError as error:
        sentence = str(error)
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or "no reason was given"
        sentence = f"An unexpected {type(error).__name__}: {reason}."
    Maker(site, cell).files.remove()
    return failed_entry(cell, sentence)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over several threads depend on their number; a zoo must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Worker:
    cell: Cell
    process: SpawnProcess
    inbox: Connection


class Crew:
    """Up to ``size`` processes, one per cell. A context manager: none outlives it."""

    def __init__(self, site: Site, size: int, progress: Progress | None) -> None:
        self._site, self._size, self._progress = site, size, progress
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    @property
    def busy(self) -> bool:
        """Whether any cell is being made."""
        return bool(self._workers)

    @property
    def full(self) -> bool:
        """Whether no further cell can start now."""
        return len(self._workers) >= self._size

    def start(self, cell: Cell) -> None:
        """Begin to make a cell."""
        inbox, outbox = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(outbox, self._site, cell), daemon=True)
        with _environment(OMP_NUM_THREADS="1"):
            process.start()
        outbox.close()
        self._workers.append(_Worker(cell, process, inbox))

    def finished(self, timeout: float) -> list[Entry]:
        """The entries of cells that ended within ``timeout`` seconds; of none, perhaps."""
        ready = wait([worker.inbox for worker in self._workers], timeout)
        found = []
        for worker in [worker for worker in self._workers if worker.inbox in ready]:
            entry = self._hear(worker)
            if entry is not None:
                worker.process.join()
                self._workers.remove(worker)
                found.append(entry)
        return found

    def _hear(self, worker: _Worker) -> Entry | None:
        try:
            message = worker.inbox.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            return failed_entry(worker.cell, f"Its process ended without a result (exit code {code}).")
        if isinstance(message, Entry):
            return message
        if self._progress is not None:
            task, done, total, note = message
            self._progress(f"{worker.cell.name}: {task}", done, total, note)
        return None

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()  # asks: the job ends after its step and keeps its state
        end = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.process.join(max(0.1, end - time.monotonic()))
            worker.process.kill()
        self._workers.clear()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(outbox: Connection, site: Site, cell: Cell) -> None:
    """What a worker's process does; messages are progress, then an entry."""
    torch.set_num_threads(1)
    logging.basicConfig(format=f"Warning: {cell.name}: %(message)s", level=logging.WARNING)
    stop, last = StopSignal(), [0.0]

    def tell(task: str, done: int, total: int, note: str = "") -> None:
        if time.monotonic() - last[0] >= _PROGRESS_EVERY:
            last[0] = time.monotonic()
            try:
                outbox.send((task, done, total, note))
            except OSError:  # whoever started the build is gone: nobody waits for this cell
                stop.requested = True

    with stop.listening():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's, which then asks us to stop
        with suppress(Stopped, BrokenPipeError):
            outbox.send(attempt(site, cell, {"progress": tell, "stop": stop}))
