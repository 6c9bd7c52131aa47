"""Cells, which are what is computed, and rows, which are what is shown.

A cell names everything its result depends on, so its key is its content address: the same cell in two suites
is computed once, and a changed setting changes the keys of what depends on it and of nothing else. Of the
code it names the package's version and the method's own file.
"""

import hashlib
import inspect
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from encoderguard.bench.suite import Suite
from encoderguard.registry import Family, method_class, method_names

__all__ = ["CLEAN", "NONE", "Cell", "Job", "Plan", "Row"]

Job = Literal["pretrain", "attack", "poison", "adopt", "scan", "purify", "evaluate", "profile"]
NONE = "none"
"""The attack that leaves the clean encoder as it is, and the defense that leaves the suspect as it is."""
CLEAN = "clean encoder"
"""In the place of a defense: the encoder as it was before the attack, under the same trigger."""
_FORMAT = 1
"""Counts changes of what a cell computes that its fields do not show."""
_FAMILIES: dict[Job, Family] = {
    "pretrain": "pretrain",
    "attack": "attack",
    "poison": "attack",
    "scan": "detector",
    "purify": "defense",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One job with all that decides its result."""

    job: Job
    method: str
    settings: dict[str, Any]
    seed: int
    needs: dict[str, "Cell"] = field(default_factory=dict)
    """By role: the cells whose results this one starts from."""
    data: dict[str, str] = field(default_factory=dict)
    """By role: image specs; of an adopted encoder its files."""
    digests: dict[str, str] = field(default_factory=dict)
    """By role: what those images were when the plan was made."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Counts, sizes, target class, probe: JSON values."""

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Everything in the key, as JSON values: other cells by their keys, images by their digests."""
        return {
            "format": _FORMAT,
            "job": self.job,
            "method": self.method,
            "code": _code(self.job, self.method),
            "settings": self.settings,
            "seed": self.seed,
            "needs": {role: cell.key for role, cell in self.needs.items()},
            "images": self.digests,
            "extra": self.extra,
        }

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key


@cache
def _code(job: Job, method: str) -> str:
    """The package's version, and a digest of the file that the method is written in."""
    family, release = _FAMILIES.get(job), version("encoderguard")
    if family is None or method not in method_names(family):
        return release
    path = inspect.getsourcefile(method_class(family, method))
    return f"{release} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}" if path else release


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table before it is known: what it is about, and the cells that hold its numbers."""

    facts: dict[str, Any]
    cells: dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compute and what to show."""

    suite: Suite
    size: str
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    """What the size asks for and cannot be run here, in words."""

    def cells(self) -> list[Cell]:
        """Every cell once, each after what it needs."""
        ordered: dict[Cell, None] = {}

        def add(cell: Cell) -> None:
            for needed in cell.needs.values():
                add(needed)
            ordered.setdefault(cell)

        for row in self.rows:
            for cell in row.cells.values():
                add(cell)
        return list(ordered)
