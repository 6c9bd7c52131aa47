"""Computes one cell: claimed, resumed if it was begun, and in the store only when it is whole."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from encoderguard.bench.cells import JOBS, Places
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import CELL, Store, title
from encoderguard.errors import EncoderGuardError, StorageError, UsageError
from encoderguard.storage import translated

__all__ = ["compute", "single_threaded"]

_RESUMING = re.compile(r"^Cannot resume|^The checkpoint ")


def compute(cell: Cell, store: Store, places: Places) -> None:
    """Run the cell's job into its folder, and mark it as finished; what it needs is finished.

    Raises:
        EncoderGuardError: the job failed; the store has no such cell then.
    """
    with store.claim(cell):
        if store.done(cell):  # by another process, while this one waited
            return
        try:
            _compute(cell, store, places)
        except OSError as error:
            _discard(cell, store)
            raise StorageError(f"{title(cell)}: {translated(error, store.folder(cell))}") from error
        except EncoderGuardError as error:
            if isinstance(error, StorageError):
                _discard(cell, store)
            raise type(error)(f"{title(cell)}: {error}") from error


def _compute(cell: Cell, store: Store, places: Places) -> None:
    blind = cell.job in ("scan", "purify")
    folder = _apart(cell, store) if blind else store.folder(cell)
    for old in {folder, store.folder(cell)}:
        _tidy(old)
    options: dict[str, Any] = {
        "seed": cell.seed,
        "device": places.device,
        "out": folder,
        "resume": any(folder.glob("checkpoint*.pt")),
        "image_size": cell.extra.get("image_size"),
        "data_root": places.data_root,
        "download": places.download,
    }
    try:
        record = JOBS[cell.job](cell, store, places, options)
    except UsageError as error:
        if not (options["resume"] and _RESUMING.search(str(error))):
            raise
        # the checkpoint is damaged, or from another version of the package: without it then
        shutil.rmtree(folder)
        record = JOBS[cell.job](cell, store, places, options | {"resume": False})
    if blind:
        shutil.rmtree(store.folder(cell), ignore_errors=True)
        store.folder(cell).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, store.folder(cell))
    store.finish(cell, record)


def _apart(cell: Cell, store: Store) -> Path:
    """The same for the same cell of a store, so that a killed one resumes; nothing of the attack is near."""
    place = hashlib.sha256(f"{store.root.resolve()} {cell.key}".encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"encoderguard-{place[:32]}"


def _tidy(folder: Path) -> None:
    """Remove what an attempt left there, unless it can be resumed."""
    if folder.exists() and not any(folder.glob("checkpoint*.pt")):
        shutil.rmtree(folder)


def _discard(cell: Cell, store: Store) -> None:
    """After an error of the disk: give back the room, and keep what can be resumed."""
    for folder in (store.folder(cell), _apart(cell, store)):
        with contextlib.suppress(OSError):  # the first error is the one to report
            (folder / CELL).unlink(missing_ok=True)
            _tidy(folder)


def single_threaded(threads: int) -> None:
    """Called in a worker process before it computes: workers share the cores instead of fighting for them."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
