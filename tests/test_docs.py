"""The documentation says what the code does: links, commands, options, settings and names exist."""

import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from encoderguard.calibration import CLEAN_SCORES
from encoderguard.cli.app import app
from encoderguard.registry import FAMILIES, Family, create, method_class, method_names, setting_docs

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [
    page
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
    if page.exists()
]
METHODS = [(family, name) for family in FAMILIES for name in method_names(family)]
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
each_method = pytest.mark.parametrize(("family", "name"), METHODS)


def prose(text: str) -> str:
    """The page without its code: fenced blocks and spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))


def links(text: str) -> Iterator[str]:
    """Targets of links and images that are not on the net."""
    found = re.findall(r"\]\(<?([^)\s>]+)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', text)
    yield from (target for target in found if not re.match(r"[a-z]+:", target))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"(?m)^#+ +(.+?)\s*$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every ``encoderguard COMMAND ...`` in a fence, an indented line or a span."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", joined)
    code = "\n".join([*blocks, *re.findall(r"(?m)^(?: {4}|\t).*", joined)])
    lines = re.findall(r"(?m)^[ \t$>]*(?:\S*/)?(encoderguard +[a-z].*)$", code)
    spans = re.findall(r"`(?:\$ )?(?:\S*/)?(encoderguard +[a-z][^`\n]*)`", joined)
    for command in (*lines, *spans):
        words = re.split(r" (?:\||&&|>|;) ", command)[0]
        yield shlex.split(words, comments=True)[1:]


def problems(words: list[str]) -> Iterator[str]:
    """What is wrong with one command line: its command, an option, or a setting of its method."""
    command = COMMANDS.get(words[0])
    if command is None:
        yield f"there is no command '{words[0]}'"
        return
    group = getattr(command, "commands", {})  # of a command such as zoo
    if group and len(words) > 1:
        if words[1] not in group:
            yield f"'{words[0]}' has no command '{words[1]}'"
            return
        command = group[words[1]]
    known = {"--help"}.union(*(parameter.opts for parameter in command.params))
    options = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    yield from (f"'{words[0]}' has no option {option}" for option in options if option not in known)
    yield from _wrong_settings(words)


FAMILY_OF: dict[str, tuple[Family, str]] = {
    "pretrain": ("pretrain", "simclr"),
    "attack": ("attack", "badencoder"),
    "poison": ("attack", "ssl_backdoor"),
    "scan": ("detector", "decree"),
    "purify": ("defense", "mimic"),
    "filter": ("filter", "patch_search"),
}
"""Family and usual method of a command; a method that is named in the words counts instead."""


def _wrong_settings(words: list[str]) -> Iterator[str]:
    pairs = itertools.pairwise(words)
    given = {value.partition("=")[0] for option, value in pairs if option in ("-p", "--setting")}
    if words[0] not in FAMILY_OF:
        return
    family, usual = FAMILY_OF[words[0]]
    name = next((word for word in words[1:] if (family, word) in METHODS), usual)
    known = {setting["name"] for setting in setting_docs(method_class(family, name))}
    yield from (f"{name} has no setting '{setting}'" for setting in sorted(given - known))


def shown(value: object) -> str:
    """A default as a card prints it."""
    return value if isinstance(value, str) else json.dumps(list(value) if isinstance(value, tuple) else value)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            missing.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            missing.append(f"{target}: no such heading")
    assert not missing, "\n".join(missing)


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    wrong = [
        f"encoderguard {shlex.join(words)}: {problem}"
        for words in commands(page.read_text(encoding="utf-8"))
        for problem in problems(words)
    ]
    assert not wrong, "\n".join(wrong)


@each_page
def test_python_examples_are_python_and_import_what_exists(page: Path) -> None:
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "encoderguard":
                module = importlib.import_module(node.module or "")
                absent = [alias.name for alias in node.names if not _has(module.__name__, alias.name)]
                assert not absent, f"{module.__name__} has no {', '.join(absent)}"


def _has(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@each_method
def test_every_method_has_a_card_with_its_settings_and_defaults(family: Family, name: str) -> None:
    card = DOCS / "methods" / f"{name}.md"
    assert card.exists(), f"{family} '{name}' needs a card: docs/methods/{name}.md"
    text = card.read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.+?) \|(?: |$)", _settings_part(text, family))
    table = dict(rows)
    settings = create(family, name).settings()
    assert set(table) == set(settings), f"docs/methods/{name}.md: the settings are {', '.join(settings)}"
    for setting, value in settings.items():
        assert table[setting] == f"`{shown(value)}`", f"{name}.{setting} is {shown(value)} by default"
    assert f"(methods/{name}.md)" in (DOCS / "index.md").read_text(encoding="utf-8")
    parts = (
        "What it does",
        "Needs",
        "Cost",
        "Settings",
        "Where it departs",
        "What it does not cover",
        "How to run",
    )
    assert not [part for part in parts if f"\n## {part}\n" not in text]


def _settings_part(text: str, family: str = "") -> str:
    """The table of the family, ``<!-- settings filter -->``, on a card of two; else the only one."""
    own = re.search(rf"(?ms)^<!-- settings {family} -->\n(.*?)^<!-- /settings -->", text)
    found = own or re.search(r"(?ms)^<!-- settings -->\n(.*?)^<!-- /settings -->", text)
    return found[1] if found else ""


def test_the_modes_of_mimic_are_as_the_card_says() -> None:
    part = _settings_part((DOCS / "methods" / "mimic.md").read_text(encoding="utf-8"))
    head, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()]
    modes = [re.sub(r"`mode=(\w+)`", r"\1", cell) for cell in head[1:-1]]
    assert modes == ["default", "paper", "authors"]
    for row in rows[1:]:
        made = [create("defense", "mimic", {"mode": mode}) for mode in modes]
        expected = [f"`{shown(method.settings()[row[0].strip('|` ')])}`" for method in made]
        assert row[1:4] == expected, row[0]


def test_the_card_of_decree_lists_every_built_in_score() -> None:
    text = (DOCS / "methods" / "decree.md").read_text(encoding="utf-8")
    section = text.partition("## Scores on known clean encoders")[2].partition("\n## ")[0]
    missing = sorted({f"{entry.score:g}" for entry in CLEAN_SCORES} - set(re.findall(r"\d+\.\d+", section)))
    assert not missing, f"docs/methods/decree.md lacks the scores {', '.join(missing)}"


# The rules themselves.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    encoderguard scan e.safetensors \\\n      --images digits --json", []),
        ("see `encoderguard list`", []),
        ("encoderguard scans the user's encoders\nEncoderGuard scans", []),
        ("```sh\nencoderguard scan e --json | head --lines 3\n```", []),
        ("`encoderguard scann e`", ["there is no command 'scann'"]),
        ("    $ encoderguard scan e --trigger t.json", ["'scan' has no option --trigger"]),
        ("    encoderguard purify e -p colour=red", ["mimic has no setting 'colour'"]),
        ("    encoderguard attack badencoder e -p epochs=1 --target 0", []),
    ],
)
def test_command_rule(text: str, expected: list[str]) -> None:
    assert [problem for words in commands(text) for problem in problems(words)] == expected


def test_link_rule() -> None:
    text = "[a](a.md) ![b](<b.png>) [c](https://example.org) `[d](d.md)` [e](#e)"
    assert list(links(text)) == ["a.md", "b.png", "#e"]
    assert anchors("# One: two\n## 1. `x` is not y!\n") == {"one-two", "1-x-is-not-y"}
