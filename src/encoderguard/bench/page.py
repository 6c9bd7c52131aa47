"""All files that are made from a result: tables in three notations, figures, one page."""

import json
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from encoderguard.bench.figures import figures
from encoderguard.bench.leaderboard import check_leaderboard
from encoderguard.bench.notation import as_csv, as_latex, as_markdown
from encoderguard.bench.outcome import RESULT, read_result, recomputed
from encoderguard.bench.tables import sheets
from encoderguard.errors import UsageError
from encoderguard.storage import write_atomic, write_text

__all__ = ["tables_of", "verify", "verify_all", "write_pages"]


def tables_of(result: Mapping[str, Any]) -> dict[str, str]:
    """The text files with numbers, by name."""
    made = sheets(result)
    head = f"# {result['title']}\n\n{result['expected']}\n\nSize: {result['size']}.\n\n"
    notes = [f"- Not run: {line}" for line in result["missing"]]
    notes += [f"- A slip in the paper: {line}" for line in result["slips"]]
    below = "\n" + "\n".join(notes) + "\n" if notes else ""
    return {
        "table.md": head + "\n".join(map(as_markdown, made)) + below,
        "table.csv": "\n".join(map(as_csv, made)),
        "table.tex": "\n".join(map(as_latex, made)),
    }


def write_pages(folder: Path) -> Path:
    """Make tables, figures and ``index.html`` from the result in ``folder``; the page's path."""
    result = read_result(folder)
    for name, text in tables_of(result).items():
        write_text(folder / name, text)
    drawn = figures(result)
    for name, data in drawn.items():
        write_atomic(folder / f"{name}.svg", partial(_fill, data))
    source = files("encoderguard.bench").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        result=result,
        sheets=sheets(result),
        figures={name: _inline(name, data) for name, data in drawn.items()},
        rows=[
            row | {"about": ", ".join(f"{k} {v}" for k, v in row["facts"].items())} for row in result["rows"]
        ],
    )
    return write_text(folder / "index.html", page)


def _inline(name: str, svg: bytes) -> str:
    """The drawing for a page that holds several: without XML head, and with identifiers of its own."""
    text = svg[svg.index(b"<svg") :].decode()
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{name}-")
    return text


def _fill(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def verify(folder: Path) -> list[str]:
    """What in a result's folder does not follow from its records; empty if all does.

    Every row is computed again from the records, and every table from the rows.

    Raises:
        UsageError: the folder holds no result.
    """
    result = read_result(folder)
    try:
        rows = recomputed(result)
    except KeyError as error:
        return [f"{folder.name}: no record {str(error)[1:13]}..., so its numbers stand on nothing"]
    faults = [
        f"{folder.name}: the values of row {number} ({_about(row)}) are not those of its records"
        for number, (row, again) in enumerate(zip(result["rows"], rows, strict=True))
        if json.dumps(row["values"], sort_keys=True) != json.dumps(again["values"], sort_keys=True)
    ]
    for name, text in tables_of(result | {"rows": rows}).items():
        try:
            same = (folder / name).read_text(encoding="utf-8") == text
        except OSError:
            same = False
        if not same:
            faults.append(f"{folder.name}: {name} is not what its records give")
    used = {key for row in result["rows"] for key in row["records"].values()}
    faults += [
        f"{folder.name}: no row uses the record {key[:12]}" for key in result["records"] if key not in used
    ]
    return faults


def verify_all(folder: Path) -> tuple[int, list[str]]:
    """How many results lie in or below ``folder``, and their faults. Raises UsageError if there is none."""
    found = sorted(path.parent for path in folder.rglob(RESULT))
    if not found:
        raise UsageError(f"There is no {RESULT} in or below {folder}; give a folder that 'bench' wrote.")
    return len(found), [fault for each in found for fault in verify(each)] + check_leaderboard(folder)


def _about(row: Mapping[str, Any]) -> str:
    return ", ".join(str(value) for value in row["facts"].values())
