"""The same cells on a Ray cluster: fractional accelerators, retries, lost workers survive."""

from collections.abc import Iterable
from typing import Any

from encoderguard.bench.cells import Places
from encoderguard.bench.engine import attempt
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store
from encoderguard.errors import SettingError

__all__ = ["OnRay"]


class OnRay:
    """A backend on an existing cluster (``RAY_ADDRESS``), else on a local one of ``workers`` processes.

    The store must be a folder that every node sees.
    """

    def __init__(self, store: Store, places: Places, *, workers: int, accelerators: float = 0.0) -> None:
        try:
            import ray
        except ImportError:
            raise SettingError(
                "The engine 'ray' needs Ray; install it with: pip install 'encoderguard[ray]'."
            ) from None
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            import os

            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **local)
        self._root, self._places = store.root.resolve(), places
        # retries are the engine's: it alone knows which cells resume
        self._task = ray.remote(num_cpus=1, num_gpus=accelerators, max_retries=0)(attempt)

    def submit(self, cell: Cell) -> Any:
        """See Backend."""
        return self._task.remote(cell, self._root, self._places)

    def finished(self, handles: Iterable[Any], seconds: float) -> list[tuple[Any, str | None, bool]]:
        """See Backend."""
        done, _ = self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        found: list[tuple[Any, str | None, bool]] = []
        for handle in done:
            try:
                found.append((handle, self._ray.get(handle), False))
            except self._ray.exceptions.RayError as error:
                found.append((handle, f"its worker was lost ({type(error).__name__})", True))
        return found

    def close(self) -> None:
        """See Backend."""
        if self._own:
            self._ray.shutdown()
