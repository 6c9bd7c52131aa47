"""One record, one HTML page that needs no other file, no network and no scripts."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from encoderguard.errors import UsageError
from encoderguard.report.blocks import Section
from encoderguard.report.reading import method_name
from encoderguard.report.sections import sections
from encoderguard.report.values import count, duration, mapping, number, sequence, size, text
from encoderguard.report.words import banner, summary
from encoderguard.results import parse_record
from encoderguard.storage import write_text

__all__ = ["read_arrays", "read_record", "render", "render_sections", "write_report"]

_PARTS = {
    "encoder": "encoder",
    "clean_encoder": "clean encoder",
    "result_encoder": "resulting encoder",
    "images": "images",
    "test_images": "test images",
    "downstream": "downstream images",
    "outputs": "file",
    "versions": "version",
    "nonfinite": "not finite",
}
_FINISHED = {"", "ok", "done", "complete", "completed", "finished", "success"}


@cache
def _template() -> jinja2.Template:
    source = files("encoderguard.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the title: what was looked at, with what, where, how long."""
    encoder, images = mapping(record.get("encoder")), mapping(record.get("images"))
    amount, seconds = number(images.get("count")), number(record.get("seconds"))
    name = text(images.get("name") or images.get("spec"))
    pairs = [
        ("encoder", text(encoder.get("spec"))),
        ("images", ", ".join(filter(None, [name, "" if amount is None else count(int(amount), "image")]))),
        ("method", method_name(record)),
        ("device", text(record.get("device"))),
        ("time", "" if seconds is None else duration(seconds)),
        ("date", text(record.get("created"))),
    ]
    return [(label, value) for label, value in pairs if value]


def _rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    return [
        (f"{prefix}{key}", text(item)) for key, item in values.items() if text(item) not in ("", "[]", "{}")
    ]


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything needed to run this again and to know that it was the same."""
    memory, seconds = number(record.get("peak_memory_bytes")), number(record.get("seconds"))
    told = {
        "run": text(record.get("command")),
        "status": text(record.get("status")),
        "created": text(record.get("created")),
        "seed": text(record.get("seed")),
        "device": text(record.get("device")),
        "device name": text(record.get("device_name")),
        "precision": text(record.get("precision")),
        "processor": text(record.get("cpu")),
        "threads": text(record.get("threads")),
        "platform": text(record.get("platform")),
        "time": "" if seconds is None else duration(seconds),
        "peak memory": "" if memory is None else size(memory),
        "commit": text(record.get("commit")) + (" with local changes" if record.get("dirty") is True else ""),
    }
    command = record.get("command")
    if isinstance(command, list):
        told["run"] = " ".join(map(text, command))
    rows = _rows(told)
    for key, name in _PARTS.items():
        rows += _rows(mapping(record.get(key)), f"{name}: ")
    return rows


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings in effect, with a mark at those that the caller gave."""
    passed = mapping(record.get("settings_passed"))
    settings = mapping(record.get("settings")) or passed
    return [
        (key, "none" if value is None else text(value), "given" if key in passed else "")
        for key, value in settings.items()
    ]


def render(record: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """The HTML page of one record.

    Args:
        record: a result record; any field may be missing or null. Rates are fractions in [0, 1].
        arrays: pictures uint8 ``[N, H, W, 3]`` (``images``, ``stamped``, ``reference``), masks ``[H, W]`` and
            patterns ``[H, W, 3]`` in [0, 1], projections of features ``[n, 2]``; others are ignored.

    Returns:
        The page; styles and pictures are inside it, everything from the record is escaped.
    """
    job = text(record.get("job")) or "run"
    method = method_name(record) + (" probe" if job == "evaluate" and record.get("method") else "")
    error, status = text(record.get("error")), text(record.get("status"))
    stopped = "" if status.lower() in _FINISHED else f"This run did not finish: status “{status}”."
    return _template().render(
        title=" with ".join(filter(None, [job[:1].upper() + job[1:], method])),
        facts=_facts(record),
        problem=error or stopped,
        warnings=[text(item) for item in sequence(record.get("warnings"))],
        banner=banner(record),
        summary=summary(record),
        sections=sections(record, arrays),
        settings=_settings(record),
        provenance=_provenance(record),
        json=json.dumps(record, indent=2, ensure_ascii=False, default=str),
    )


def render_sections(
    title: str,
    sections: Sequence[Section],
    *,
    facts: Sequence[tuple[str, str]] = (),
    summary: str = "",
    provenance: Sequence[tuple[str, str]] = (),
    content: Any = None,
) -> str:
    """A page about something other than one run; ``content`` is shown in full as JSON."""
    return _template().render(
        title=title,
        facts=facts,
        problem="",
        warnings=[],
        banner=None,
        summary=summary,
        sections=sections,
        settings=[],
        provenance=provenance,
        json=json.dumps(content, indent=2, ensure_ascii=False, default=str),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record in ``folder``.

    Raises:
        UsageError: there is no ``result.json``, or it is not a record of this version.
    """
    path = folder / "result.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"Expected a folder with a result.json, but {path} does not exist; "
            "give the --out folder of an earlier run."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read as a record ({error}); run the job again to replace it."
        ) from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UsageError(
            f"{path} must hold one JSON object, but holds a {kind}; give the folder of an earlier run."
        )
    parse_record(json.dumps(record), source=str(path))
    return record


def read_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays beside the record, or none. Pickled arrays are refused, never loaded.

    Raises:
        UsageError: ``arrays.npz`` is there but broken.
    """
    path = folder / "arrays.npz"
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read as plain arrays ({error}); delete it to make a report without pictures."
        ) from None


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, from its ``result.json`` and optional ``arrays.npz``.

    Returns:
        The path of the page.

    Raises:
        UsageError: there is no record, or it or its arrays cannot be read.
        OutputError: the folder cannot be written.
        StorageError: the disk is full; nothing is left half-written.
    """
    page = render(read_record(folder), read_arrays(folder))
    return write_text(folder / "report.html", page)
