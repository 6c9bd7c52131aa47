"""Records as JSON: written atomically, read strictly."""

import json
from pathlib import Path

from pydantic import ValidationError

from encoderguard.errors import UsageError
from encoderguard.results.records import RECORDS, SCHEMA_VERSION, Record
from encoderguard.storage import write_text

__all__ = ["RESULT", "parse_record", "read_record", "to_json", "write_record"]

RESULT = "result.json"
"""Name of the record in a run's folder."""


def to_json(record: Record) -> str:
    """The record as indented JSON with a final newline."""
    return record.model_dump_json(indent=2) + "\n"


def write_record(record: Record, folder: Path) -> Path:
    """Write ``result.json`` into ``folder`` atomically. Raises as ``write_atomic``."""
    return write_text(folder / RESULT, to_json(record))


def read_record(path: Path) -> Record:
    """Read a record file, or the record in a run's folder.

    Raises:
        UsageError: missing, not a record, or written by a newer version.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"There is no record {file}; give a run's folder or its {RESULT}.") from None
    return parse_record(text, source=str(file))


def parse_record(text: str, *, source: str = "the text") -> Record:
    """The record in JSON ``text``. Raises UsageError as ``read_record``; ``source`` is named there."""
    try:
        data = json.loads(text)
        version, job = int(data["schema_version"]), str(data["job"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise UsageError(
            f"{source} is not a record: expected a JSON object with schema_version and job."
        ) from None
    if version < 1:
        raise UsageError(f"{source} has schema version {version}; the first is 1. Run the job again.")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{source} has schema version {version}, which is newer than the {SCHEMA_VERSION} known here; "
            "update EncoderGuard to read it."
        )
    if job not in RECORDS:
        raise UsageError(
            f"{source} is a record of an unknown job '{job}'; known are {', '.join(sorted(RECORDS))}."
        )
    try:
        return RECORDS[job].model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the object"
        raise UsageError(f"{source} is not a valid {job} record: {where}: {first['msg']}.") from None
