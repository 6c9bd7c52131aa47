"""Whether a finished job is the one that a cell asks for: the record says what ran, the cell what should."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoderguard.errors import EncoderGuardError
from encoderguard.results import Record, read_record
from encoderguard.triggers import load_trigger
from encoderguard.zoo.manifest import sha256_of

__all__ = ["difference", "finished", "trigger_digest"]


def finished(folder: Path) -> Record | None:
    """The record of a successful job whose files are all there and whole, or None."""
    try:
        record = read_record(folder)
    except EncoderGuardError:
        return None
    if record.status != "success":
        return None
    for name, digest in record.outputs.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            return None
    return record


def difference(
    record: Record, expected: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> str | None:
    """The first fact in which a record is not what was expected, or None.

    A setting that the record does not have came later than the run; the run did as its default in
    ``defaults`` says.
    """
    facts = _facts(record)
    facts["settings"] = dict(defaults or {}) | facts["settings"]
    for key, value in expected.items():
        if facts.get(key) != value:
            return f"{key} is {facts.get(key)!r}, expected {value!r}"
    return None


def trigger_digest(path: Path) -> str:
    """The digest of a trigger's content, as an evaluation records it."""
    return hashlib.sha256(repr(load_trigger(path).to_dict()).encode()).hexdigest()


def _facts(record: Record) -> dict[str, Any]:
    facts = {name: getattr(record, name, None) for name in ("job", "method", "settings", "seed", "precision")}
    facts |= {name: getattr(record, name, None) for name in ("target", "seeds")}
    for name in ("encoder", "clean_encoder"):
        found = getattr(record, name, None)
        facts[name] = None if found is None else found.fingerprint
    for name in ("images", "test_images", "downstream"):
        found = getattr(record, name, None)
        facts[name] = None if found is None else found.digest
        facts[f"{name}_size"] = None if found is None else found.height
    facts["references"] = len(getattr(record, "references", []))
    stamp = getattr(record, "trigger", None)
    facts["trigger"] = None if stamp is None else stamp.get("digest")
    return facts
