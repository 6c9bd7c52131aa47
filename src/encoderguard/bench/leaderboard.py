"""One page over all results of a folder: what was run, and who is ahead."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoderguard.bench.notation import Sheet, as_markdown
from encoderguard.bench.outcome import RESULT, read_result
from encoderguard.bench.plan import NONE
from encoderguard.bench.tables import encoder_of, rank_sheets
from encoderguard.registry import method_names
from encoderguard.storage import write_text

__all__ = ["check_leaderboard", "leaderboard", "leaderboard_pages", "write_leaderboard"]

_NOTE = (
    "Over all results of this folder, by size and by what was attacked how; each encoder counts once (n). "
    "Defenses are ranked on the same encoders: on all that there are, and, where some were run on fewer, on "
    "those that all were run on. A method under settings other than the size's, as in ablations, is not "
    "ranked; of a method that was run on an encoder of a zoo by several versions the last run counts."
)


def leaderboard(results: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """The ranks of defenses for each attack, and the rates of detectors, over several results.

    Args:
        results: as ``read_result`` gives them, of one size.
    """
    known = {"defense": {NONE, *method_names("defense")}, "detector": set(method_names("detector"))}
    cases: dict[str, Mapping[str, Any]] = {}
    when: dict[str, str] = {}
    for result in results:
        for row in result["rows"]:
            family = "defense" if "defense" in row["facts"] else "detector"
            if row["facts"].get(family) in known[family] and "x" not in row["facts"] and not row["failed"]:
                case, created = _case(family, row), _created(row, result)
                if created >= when.get(case, ""):
                    cases[case], when[case] = row, created
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in cases.values():
        facts = row["facts"]
        attacked = f"{facts['attack'].lower()} on {facts['pretrain']}, {facts['task']}"
        groups.setdefault(attacked if "defense" in facts else "", []).append(row)
    return [
        replace(sheet, title=f"Defenses: {about}{where}" if about else sheet.title)
        for about, members in groups.items()
        for where, rows in (_comparable(members) if about else [("", members)])
        for sheet in rank_sheets(rows)
    ]


def _case(family: str, row: Mapping[str, Any]) -> str:
    """What counts once: a method on an encoder of a zoo, or else the very same cells."""
    facts = row["facts"]
    if facts.get("victim") is None:
        return f"{family} {sorted(row['records'].items())}"
    told = [facts.get(name) for name in (family, "pretrain", "attack", "task", "encoder", "victim", "seed")]
    return f"{family} {told}"


def _created(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """When the row's last cell was begun, ISO 8601 in UTC; empty if it is not known."""
    records = result.get("records", {})
    held = (records[key]["record"] for key in row["records"].values() if key in records)
    return max((str(record.get("created") or "") for record in held), default="")


def _comparable(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows of defenses on the same encoders: of those on all encoders, and of all on the shared ones."""
    by_defense: dict[str, set[tuple[Any, ...]]] = {}
    for row in rows:
        by_defense.setdefault(row["facts"]["defense"], set()).add(encoder_of(row))
    every, shared = set.union(*by_defense.values()), set.intersection(*by_defense.values())
    if every == shared:
        return [("", list(rows))]
    whole = [row for row in rows if by_defense[row["facts"]["defense"]] == every]
    common = [row for row in rows if encoder_of(row) in shared]
    found = [(f", {len(every)} encoders", whole), (f", {len(shared)} of {len(every)} encoders", common)]
    return [(where, members) for where, members in found if members]


def leaderboard_pages(out: Path) -> dict[str, str]:
    """The files that belong in ``out``, by name, from the results in the folders below it."""
    folders = sorted(path.parent for path in out.glob(f"*/{RESULT}"))
    results = [read_result(folder) for folder in folders]
    lines, body = ["# Leaderboard", "", _NOTE, ""], ["<h1>Leaderboard</h1>", f"<p>{_NOTE}</p>"]
    for size in dict.fromkeys(result["size"] for result in results):
        lines += [f"## Size {size}", ""]
        body.append(f"<h2>Size {html.escape(size)}</h2>")
        for sheet in leaderboard([result for result in results if result["size"] == size]):
            lines.append(as_markdown(sheet))
            body.append(_table(sheet))
    lines += ["## Results", ""]
    body.append("<h2>Results</h2><ul>")
    for folder, result in zip(folders, results, strict=True):
        failed = sum(bool(row["failed"]) for row in result["rows"])
        about = f"{result['size']}: {len(result['rows'])} rows" + (f", {failed} failed" if failed else "")
        lines.append(f"- [{result['title']}]({folder.name}/table.md), {about}")
        title = f'<a href="{folder.name}/index.html">{html.escape(result["title"])}</a>'
        body.append(f"<li>{title}, {about}</li>")
    page = _PAGE.format(body="\n".join([*body, "</ul>"]))
    return {"leaderboard.md": "\n".join(lines) + "\n", "index.html": page}


def write_leaderboard(out: Path) -> Path:
    """Write ``OUT/leaderboard.md`` and ``OUT/index.html``; the page's path."""
    for name, text in leaderboard_pages(out).items():
        page = write_text(out / name, text)
    return page


def check_leaderboard(out: Path) -> list[str]:
    """What in ``out``, if it holds a leaderboard, does not follow from the results below it."""
    if not (out / "leaderboard.md").exists():
        return []
    return [
        f"{out.name}: {name} is not what its results give"
        for name, text in leaderboard_pages(out).items()
        if not (out / name).is_file() or (out / name).read_text(encoding="utf-8") != text
    ]


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in sheet.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows
    )
    return f"<h3>{html.escape(sheet.title)}</h3><table><tr>{head}</tr>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title><style>
body{{font:16px/1.5 system-ui,sans-serif;color:#2b333b;max-width:70rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;font-size:.85rem}}
th,td{{border-bottom:1px solid #e3e8ed;padding:.3rem .6rem;text-align:left}}
th{{background:#f5f7f9}}</style></head><body>
{body}
</body></html>
"""
