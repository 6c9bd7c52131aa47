"""The known methods, for ``encoderguard list``."""

import inspect
from collections.abc import Sequence
from typing import Any

from encoderguard.registry import FAMILIES, method_class, method_names, setting_docs

__all__ = ["catalogue", "in_words"]

_FACTS = {"paper": "paper", "year": "year", "needs": "needs", "cost": "cost", "blind_spots": "does not cover"}
"""What ``list`` says of a method beside its summary and settings."""


def catalogue() -> list[dict[str, Any]]:
    """Family, name, paper, year, needs, cost, blind spots, summary and settings of every method."""
    return [_entry(family, name) for family in FAMILIES for name in method_names(family)]


def _entry(family: Any, name: str) -> dict[str, Any]:
    cls = method_class(family, name)
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return {
        "family": family,
        "name": name,
        "paper": cls.paper,
        "year": cls.year,
        "needs": cls.needs,
        "cost": cls.cost,
        "blind_spots": cls.blind_spots,
        "summary": " ".join(summary.split()),
        "settings": setting_docs(cls),
    }


def in_words(methods: Sequence[dict[str, Any]]) -> str:
    """The same for people: one block per method."""
    blocks = []
    for method in methods:
        lines = [f"{method['family']} {method['name']}", f"  {method['summary']}"]
        lines += [f"  {label}: {method[key]}" for key, label in _FACTS.items() if method[key]]
        for setting in method["settings"]:
            doc = " ".join(setting["doc"].split())
            lines.append(f"    -p {setting['name']}={setting['default']}  {doc}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
