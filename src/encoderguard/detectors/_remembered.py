"""Finished searches, kept in files: for the next suspect, and for a scan that is stopped on its way.

Every encoder is asked the same questions on the same images, whatever the suspect is, so the searches of
clean references serve every suspect.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from encoderguard.rays import Ray, TriggerFamily
from encoderguard.run import Run
from encoderguard.search.found import FamilyResult, Found
from encoderguard.storage import write_atomic, write_text
from encoderguard.triggers import Trigger, trigger_from_dict

__all__ = ["continued", "remembered"]

_KEPT = ("bank", "displacements", "curve")
_ALL = (*_KEPT, "label", "measured", "refined")
_FORMAT = 3
"""Of the files of a stopped scan: another one is not read, and the search is done again."""


def remembered(
    folder: Path,
    facts: Mapping[str, Any],
    rays: Mapping[TriggerFamily, tuple[Ray, ...]],
    search: Callable[[], Found],
) -> Found:
    """What ``search`` finds, from the folder if the same search was kept there, else kept for next time.

    Args:
        folder: made if it is missing. A file that cannot be read is replaced.
        facts: everything that the search depends on, as JSON values; the package's version is added.
        rays: the candidates of each family, in the order of the bank.
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
    families = {
        family: FamilyResult(
            bank=known[family]["bank"],
            displacements=known[family]["displacements"],
            curve=known[family]["curve"],
            tried=list(own[: len(known[family]["bank"])]),
        )
        for family, own in rays.items()
    }
    return Found(families=families, seconds={}, images_passed=0, complete=True)


def _read(path: Path) -> dict[str, dict[str, list[float]]] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {family: {name: list(values[name]) for name in _KEPT} for family, values in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def continued(
    run: Run,
    facts: Mapping[str, Any],
    rays: Mapping[TriggerFamily, tuple[Ray, ...]],
    search: Callable[[], Found],
) -> Found:
    """What ``search`` finds, kept beside the run's checkpoint; not searched again if the run resumes.

    Args:
        run: of this search alone; without a checkpoint nothing is kept.
        facts: everything that the search depends on.
        rays: the bank that is searched.
        search: a search of one encoder.

    Raises:
        OutputError: the folder cannot be written.
        StorageError: the disk is full.
    """
    path, text = run.checkpoint, json.dumps({**facts, "format": _FORMAT}, sort_keys=True)
    if path is None:
        return search()
    known = _stopped_at(path, text) if run.resume else None
    if known is not None:
        return _restored(known, rays)
    found = search()
    families = {
        str(family): {name: getattr(result, name) for name in _ALL}
        | {"triggers": json.dumps([each.to_dict() for each in _triggers(result)])}
        for family, result in found.families.items()
    }
    told = {"seconds": found.seconds, "images_passed": found.images_passed, "complete": found.complete}
    write_atomic(path, lambda file: torch.save({"facts": text, "families": families, **told}, file))
    return found


def _triggers(result: FamilyResult) -> tuple[Trigger, Trigger, Trigger]:
    strongest = result.strongest
    return result.weakest, strongest, result.plain or strongest


def _stopped_at(path: Path, facts: str) -> dict[str, Any] | None:
    """What was kept there of this very search, if it can be read."""
    try:
        known = torch.load(path, weights_only=True)
    except Exception:  # missing, or garbage, which reaches torch's reader as almost any exception
        return None
    return known if isinstance(known, dict) and known.get("facts") == facts else None


def _restored(known: Mapping[str, Any], rays: Mapping[TriggerFamily, tuple[Ray, ...]]) -> Found:
    families = {}
    for family, own in rays.items():
        kept = known["families"][family]
        weakest, strongest, plain = map(trigger_from_dict, json.loads(kept["triggers"]))
        families[family] = FamilyResult(
            **{name: kept[name] for name in _ALL},
            tried=list(own[: len(kept["bank"])]),
            plain=plain,
            read=(weakest, strongest),
        )
    return Found(
        families=families,
        seconds=known["seconds"],
        images_passed=known["images_passed"],
        complete=known["complete"],
    )
