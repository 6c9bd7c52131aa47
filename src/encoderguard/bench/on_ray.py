"""The same cells on a Ray cluster: fractional accelerators, retries, lost workers survive."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoderguard.bench.cells import Places
from encoderguard.bench.computing import single_threaded
from encoderguard.bench.local import attempt, sigint_held, threads_each
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store
from encoderguard.errors import SettingError

__all__ = ["OnRay"]

_OBJECTS = 100 << 20
"""Bytes of Ray's own memory: cells hand over sentences, their results go through the store."""


class OnRay:
    """A backend on an existing cluster (``RAY_ADDRESS``), else on a local one of ``workers`` processes.

    The store, the data and the folder from which it is started must be where every node sees them.
    """

    def __init__(
        self, store: Store, places: Places, *, workers: int | None = None, accelerators: float | None = None
    ) -> None:
        """Connect, or start a cluster.

        Args:
            store: of the finished cells.
            places: where data are, which device.
            workers: cells at the same time; as many as the cluster has room for by default.
            accelerators: share of one for each cell, such as 0.25; 0 is the CPU. By default a whole one where
                the cluster has any.

        Raises:
            SettingError: Ray is not installed, there is no cluster, or not with so many accelerators.
        """
        _check_share(accelerators)
        self._ray = _imported()
        self._own = not self._ray.is_initialized()
        self._running: dict[Any, None] = {}
        if self._own:
            _start(self._ray, workers)
        try:
            there = self._ray.cluster_resources()
            share = _share(accelerators, there, places.device)
        except BaseException:
            self.close()
            raise
        room = int(there.get("CPU", 1) if share == 0 else min(there.get("CPU", 1), there["GPU"] / share))
        self.at_once = workers or max(1, room)
        if share == 0 and places.device == "auto":
            places = replace(places, device="cpu")  # Ray does not hide what a task did not ask for
        threads = threads_each(self.at_once) if _local_cluster() and self._own else threads_each(10**6)
        self._fixed = (store.root.resolve(), _absolute(places), Path.cwd(), threads)
        # retries are the engine's: it alone knows which cells resume
        self._task = self._ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(_attempt)

    def submit(self, cell: Cell) -> Any:
        """See Backend."""
        handle = self._task.remote(cell, *self._fixed)
        self._running[handle] = None
        return handle

    def finished(self, handles: Iterable[Any], seconds: float) -> list[tuple[Any, str | None, bool]]:
        """See Backend."""
        waiting, errors = list(handles), self._ray.exceptions
        if not waiting:
            return []
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=seconds)
        found: list[tuple[Any, str | None, bool]] = []
        for handle in done:
            self._running.pop(handle, None)
            try:
                found.append((handle, self._ray.get(handle), False))
            except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:  # as it would be next time
                found.append((handle, f"A Ray worker could not begin: {_last_line(error)}", False))
            except errors.RayError as error:
                found.append((handle, f"its worker was lost ({type(error).__name__})", True))
        return found

    def close(self) -> None:
        """See Backend."""
        with sigint_held():  # a second Ctrl-C must not leave a cluster behind
            if self._own:
                self._ray.shutdown()
            else:
                for handle in self._running:
                    self._ray.cancel(handle, force=True)


def _attempt(cell: Cell, root: Path, places: Places, folder: Path, threads: int) -> str | None:
    """In a worker: as on this machine, from the same folder, so that relative paths mean the same files."""
    os.chdir(folder)
    single_threaded(threads)
    return attempt(cell, root, places)


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise SettingError(
            "The engine 'ray' needs Ray; install it with: pip install 'encoderguard[ray]'."
        ) from None
    return ray


def _local_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") in ("", "local")


def _start(ray: Any, workers: int | None) -> None:
    local: dict[str, Any] = {}
    if _local_cluster():
        local = {"address": "local", "num_cpus": workers, "object_store_memory": _OBJECTS}
    if not local:
        _check_reachable(os.environ["RAY_ADDRESS"])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone unasked
    try:
        with _handlers_kept():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if local:
            raise SettingError(f"Ray cannot start a cluster here: {_last_line(error)}") from None
        where = f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise SettingError(
            f"The Ray cluster {where} cannot be joined ({_last_line(error)}); "
            "if it asks for a token, set RAY_AUTH_MODE=token as on its nodes."
        ) from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Raises SettingError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # a name that Ray knows, such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise SettingError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}); "
            "correct it, or unset it to use a cluster on this machine."
        ) from None


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of SIGTERM over ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_share(share: float | None) -> None:
    if share is not None and (share < 0 or (share > 1 and share != int(share))):
        raise SettingError(
            f"A cell cannot have {share:g} accelerators; give 0, a share such as 0.25, or a whole number."
        )


def _share(asked: float | None, there: dict[str, float], device: str) -> float:
    """Accelerators of one cell. Raises SettingError if the cluster has not so many."""
    has = there.get("GPU", 0.0)
    if asked is None:
        return 1.0 if has >= 1 and device != "cpu" else 0.0
    if asked > has:
        raise SettingError(
            f"A cell asks for {asked:g} accelerators and the Ray cluster has {has:g}; "
            "give a smaller share with --accelerators, or 0 for the CPU."
        )
    return asked


def _absolute(places: Places) -> Places:
    packs, data_root = (path and str(Path(path).resolve()) for path in (places.packs, places.data_root))
    return replace(places, packs=packs, data_root=data_root)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
