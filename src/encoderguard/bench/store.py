"""A content-addressed store of finished cells. What is in it is whole; what is broken is set aside."""

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from encoderguard.bench.plan import Cell
from encoderguard.errors import OutputError
from encoderguard.storage import prepare_folder, translated, write_text

try:
    import fcntl
except ImportError:  # Windows: two runs at once on one store may then compute a cell twice
    fcntl = None  # type: ignore[assignment]

__all__ = ["CELL", "Store", "count_finished", "file_digest", "sweep", "title"]

CELL = "cell.json"
"""Written last: a folder without it is not finished."""
_LOG = logging.getLogger("encoderguard")


class Store:
    """Cells below ``root``: ``cells/ab/abcd.../`` holds a job's files and ``cell.json`` with digests."""

    def __init__(self, root: Path) -> None:
        self.root = prepare_folder(root)
        self.quarantined: list[str] = []
        """What was set aside, in words, since this object was made."""

    def folder(self, cell: Cell) -> Path:
        """Where the cell's files are or will be."""
        return _place(self.root, cell)

    def done(self, cell: Cell) -> bool:
        """Whether the cell is there and whole; a broken one is set aside, to be computed again.

        Raises:
            OutputError: a broken one cannot be moved.
        """
        fault = self._fault(cell, self.folder(cell))
        if fault:
            self.set_aside(cell, fault)
        return fault is None

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What ``cell.json`` holds: identity, record, seconds, digests of the files."""
        held: dict[str, Any] = json.loads((self.folder(cell) / CELL).read_text(encoding="utf-8"))
        return held

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Mark a cell as finished; its files are in its folder already.

        Raises:
            OutputError: writing there is not allowed.
            StorageError: the disk is full.
        """
        folder = self.folder(cell)
        sweep(folder)
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if _kept(path)}
        facts = {"key": cell.key, "identity": cell.identity(), "files": files, "record": record}
        write_text(folder / CELL, json.dumps(facts | {"digest": _digest(facts)}, indent=1) + "\n")

    def set_aside(self, cell: Cell, reason: str) -> None:
        """Move a cell's folder to ``quarantine/``, where it can be looked at.

        Raises:
            OutputError: it cannot be moved.
        """
        place = prepare_folder(self.root / "quarantine") / cell.key
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{cell.key}-{number}")
        try:
            self.folder(cell).replace(place)
        except OSError as error:
            raise OutputError(
                f"The broken cell {self.folder(cell)} ({reason}) cannot be moved to {place}: "
                f"{error.strerror}; remove it and run again."
            ) from None
        line = f"{title(cell)} {cell.key[:12]}: {reason}"
        self.quarantined.append(line)
        _LOG.warning(f"Set aside in {place}, to be computed again: {line}.")

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[None]:
        """Wait until no other process computes the cell, then keep others waiting.

        The system holds it for the process, so one that is killed lets go. ``locks/KEY`` names process and
        machine.

        Raises:
            OutputError: the store cannot be written.
            StorageError: the disk is full.
        """
        if fcntl is None:
            yield
            return
        path = self.root / "locks" / cell.key
        lock = _locked(path)
        try:
            with contextlib.suppress(OSError):  # it is for people to read
                os.truncate(lock, 0)
                os.write(lock, f"{os.getpid()} {socket.gethostname()}\n".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)

    def _fault(self, cell: Cell, folder: Path) -> str | None:
        """None: whole; empty: not there; else what is wrong with it."""
        try:
            if not (folder / CELL).exists():
                return ""
            facts = self.facts(cell)
            if facts["identity"] != cell.identity():
                return "its cell.json describes another cell"
            if _digest(facts) != facts.get("digest", _digest(facts)):
                return "its cell.json has changed"
            files = dict(facts["files"])
        except OSError as error:
            return f"its cell.json cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"its cell.json cannot be read ({type(error).__name__})"
        for name, digest in files.items():
            try:
                found = file_digest(folder / name)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if found != digest:
                return f"{name} has changed"
        return None


def count_finished(root: Path, cells: Iterable[Cell]) -> int:
    """How many of the cells a store below ``root`` has; looks only: none is checked, no folder is made."""
    return sum((_place(root, cell) / CELL).is_file() for cell in cells)


def title(cell: Cell) -> str:
    """The cell in words, such as ``purify mimic (seed 0)``."""
    return f"{cell.job} {cell.method} (seed {cell.seed})"


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; nobody else may write there now."""
    for path in [*folder.glob(".*.part"), *folder.glob(".probe-*")]:
        path.unlink(missing_ok=True)


def _place(root: Path, cell: Cell) -> Path:
    return root / "cells" / cell.key[:2] / cell.key


def _locked(path: Path) -> int:
    """A descriptor of the locked file; one that its last holder removed while we waited does not count."""
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise translated(error, path) from error
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _digest(facts: dict[str, Any]) -> str:
    told = {name: value for name, value in facts.items() if name != "digest"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _kept(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "checkpoint", "resume", "cell"))
