"""A content-addressed store of finished cells. What is in it is whole; what is broken is set aside."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from encoderguard.bench.plan import Cell
from encoderguard.errors import OutputError
from encoderguard.storage import prepare_folder, write_text

__all__ = ["CELL", "Store", "file_digest"]

CELL = "cell.json"
"""Written last: a folder without it is not finished."""


class Store:
    """Cells below ``root``: ``cells/ab/abcd.../`` holds a job's files and ``cell.json`` with digests."""

    def __init__(self, root: Path) -> None:
        self.root = prepare_folder(root)
        self.quarantined: list[str] = []
        """What was set aside, in words, since this object was made."""

    def folder(self, cell: Cell) -> Path:
        """Where the cell's files are or will be."""
        return self.root / "cells" / cell.key[:2] / cell.key

    def done(self, cell: Cell) -> bool:
        """Whether the cell is there and whole; a broken one is set aside, to be computed again."""
        folder = self.folder(cell)
        if not (folder / CELL).exists():
            return False
        fault = self._fault(cell, folder)
        if fault is None:
            return True
        self.set_aside(cell, fault)
        return False

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What ``cell.json`` holds: identity, record, seconds, digests of the files."""
        held: dict[str, Any] = json.loads((self.folder(cell) / CELL).read_text(encoding="utf-8"))
        return held

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Mark a cell as finished; its files are in its folder already."""
        folder = self.folder(cell)
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if _kept(path)}
        facts = {"key": cell.key, "identity": cell.identity(), "files": files, "record": record}
        write_text(folder / CELL, json.dumps(facts, indent=1) + "\n")

    def set_aside(self, cell: Cell, reason: str) -> None:
        """Move a cell's folder to ``quarantine/``, where it can be looked at."""
        place = prepare_folder(self.root / "quarantine") / cell.key
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{cell.key}-{number}")
        self.quarantined.append(f"{cell.job} {cell.method} {cell.key[:12]}: {reason}")
        try:
            self.folder(cell).replace(place)
        except OSError as error:
            raise OutputError(
                f"The broken cell {self.folder(cell)} cannot be moved: {error.strerror}."
            ) from None

    def clear(self, cell: Cell) -> None:
        """Remove what an unfinished attempt left, unless it can be resumed."""
        folder = self.folder(cell)
        if folder.exists() and not any(folder.glob("checkpoint*.pt")):
            shutil.rmtree(folder)

    def _fault(self, cell: Cell, folder: Path) -> str | None:
        try:
            facts = self.facts(cell)
            if facts["identity"] != cell.identity():
                return "its cell.json describes another cell"
            files: dict[str, str] = facts["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"its cell.json cannot be read ({type(error).__name__})"
        for name, digest in files.items():
            try:
                found = file_digest(folder / name)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if found != digest:
                return f"{name} has changed"
        return None


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "checkpoint", "resume", "cell"))
