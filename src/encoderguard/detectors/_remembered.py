"""Searches of clean references, kept in a folder, so that a second suspect costs one search.

Every encoder is asked the same questions on the same images, whatever the suspect is.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from encoderguard.detectors._trigger_found import FamilyResult, Found
from encoderguard.storage import write_text

__all__ = ["remembered"]

_KEPT = ("bank", "displacements", "curve")


def remembered(folder: Path, facts: Mapping[str, Any], search: Callable[[], Found]) -> Found:
    """What ``search`` finds, from the folder if the same search was kept there, else kept for next time.

    Args:
        folder: made if it is missing. A file that cannot be read is replaced.
        facts: everything that the search depends on, as JSON values; the package's version is added.
        search: a search of a clean encoder.

    Returns:
        What comparing with it needs: curves and the bank's values, without triggers and times.

    Raises:
        OutputError: the folder cannot be written.
        StorageError: the disk is full.
    """
    text = json.dumps({**facts, "version": version("encoderguard")}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    known = _read(path)
    if known is None:
        found = search()
        known = {
            family: {name: getattr(result, name) for name in _KEPT}
            for family, result in found.families.items()
        }
        write_text(path, json.dumps(known) + "\n")
    families: Any = {
        family: FamilyResult(
            bank=values["bank"], displacements=values["displacements"], curve=values["curve"]
        )
        for family, values in known.items()
    }
    return Found(families=families, seconds={}, images_passed=0, complete=True)


def _read(path: Path) -> dict[str, dict[str, list[float]]] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {family: {name: list(values[name]) for name in _KEPT} for family, values in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
