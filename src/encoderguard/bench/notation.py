"""One table in Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Sheet", "as_csv", "as_latex", "as_markdown"]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table: a title, a header, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def as_markdown(sheet: Sheet) -> str:
    """A Markdown table under its title."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(sheet.header)
    lines = [f"### {sheet.title}", "", line(sheet.header), rule, *map(line, sheet.rows)]
    return "\n".join([*lines, *(["", sheet.note] if sheet.note else [])]) + "\n"


def as_csv(sheet: Sheet) -> str:
    """Comma-separated values with a header."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([list(sheet.header), *map(list, sheet.rows)])
    return stream.getvalue()


def as_latex(sheet: Sheet) -> str:
    """A ``tabular`` with the rules of booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_tex(cell) for cell in cells) + r" \\"

    begin = rf"\begin{{tabular}}{{{'l' * len(sheet.header)}}}"
    return "\n".join(
        [f"% {sheet.title}", begin, r"\toprule", line(sheet.header), r"\midrule"]
        + [line(row) for row in sheet.rows]
        + [r"\bottomrule", r"\end{tabular}", ""]
    )


def _tex(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, "\\" + sign)
    return text.replace("±", r"$\pm$")
