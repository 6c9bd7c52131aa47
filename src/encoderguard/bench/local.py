"""Worker processes on this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from encoderguard.bench.cells import Places
from encoderguard.bench.computing import compute, single_threaded
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store, title
from encoderguard.errors import EncoderGuardError

__all__ = ["Local", "attempt", "sigint_held", "threads_each"]


class Local:
    """Single workers, one cell each at a time: one that dies costs its cell and no other."""

    def __init__(self, store: Store, places: Places, *, workers: int) -> None:
        self.store, self.places, self.at_once = store, places, workers
        self.threads = threads_each(workers)
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[str | None], ProcessPoolExecutor] = {}

    def submit(self, cell: Cell) -> Future[str | None]:
        """See Backend."""
        with _starting(self.threads):
            while self._idle:
                try:
                    return self._given(self._idle.pop(), cell)
                except BrokenProcessPool:  # it died while it had nothing to do
                    continue
            return self._given(self._made(), cell)

    def finished(
        self, handles: Iterable[Future[str | None]], seconds: float
    ) -> list[tuple[Future[str | None], str | None, bool]]:
        """See Backend."""
        done, _ = wait(list(handles), timeout=seconds, return_when=FIRST_COMPLETED)
        found = []
        for handle in done:
            worker = self._busy.pop(handle)
            try:
                found.append((handle, handle.result(), False))
                self._idle.append(worker)
            except BrokenProcessPool:
                worker.shutdown(wait=False)
                found.append((handle, "its worker process died (killed, or out of memory)", True))
        return found

    def close(self) -> None:
        """See Backend."""
        workers = [*self._idle, *self._busy.values()]
        for worker in workers:
            for process in list((worker._processes or {}).values()):
                process.terminate()
        for worker in workers:
            worker.shutdown(wait=True, cancel_futures=True)

    def _made(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        return ProcessPoolExecutor(1, mp_context=context, initializer=partial(_prepare, self.threads))

    def _given(self, worker: ProcessPoolExecutor, cell: Cell) -> Future[str | None]:
        handle = worker.submit(attempt, cell, self.store.root, self.places)
        self._busy[handle] = worker
        return handle


def threads_each(workers: int) -> int:
    """``OMP_NUM_THREADS``, or each worker's share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, (os.cpu_count() or 1) // workers)


def attempt(cell: Cell, root: Path, places: Places) -> str | None:
    """Compute a cell in a worker: None, or the sentence that says why not."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            compute(cell, Store(root), places)
    except EncoderGuardError as error:
        return str(error)
    except Exception as error:  # a bug in one method must not end the grid
        return f"{title(cell)}: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def sigint_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which is for their parent; the parent's own comes after."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _starting(threads: int) -> Iterator[None]:
    """Surroundings of a worker: some libraries read their number of threads when they are loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with sigint_held():
            yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _prepare(threads: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    single_threaded(threads)


def _end_with(parent: "multiprocessing.process.BaseProcess") -> None:
    """A worker whose parent was killed would wait for it for ever, and compute beside its successor."""
    parent.join()
    os._exit(1)
