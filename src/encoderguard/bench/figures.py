"""The papers' figures, redrawn from the rows of a result; each point is a link to its record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from encoderguard.bench.plan import NONE
from encoderguard.report.figures import COLOURS, styled, to_svg

__all__ = ["figures"]

Row = Mapping[str, Any]


def figures(result: Mapping[str, Any]) -> dict[str, bytes]:
    """SVG files by name: what the kind of the result and its rows allow."""
    rows = [row for row in result["rows"] if not row["failed"]]
    made: dict[str, bytes] = {}
    with styled():
        if any("map" in row["values"] for row in rows):
            made["maps"] = _maps(rows)
        if any("x" in row["facts"] and "defense" in row["facts"] for row in rows):
            made["sweep"] = _sweep(rows, result["axis"])
        if any(row["values"].get("asr") is not None for row in rows):
            made["heat"] = _heat(rows)
        if any("detector" in row["facts"] for row in rows):
            made |= {"scores": _scores(rows), "roc": _roc(rows)}
        if result["kind"] == "profile" and rows:
            made["profile"] = _profile(rows)
    return made


def _linked(axes: Axes, x: Sequence[float], rows: Sequence[Row], name: str, role: str, **style: Any) -> None:
    """A point for each row, at ``x`` and the row's value of that name in per cent (scores as they are)."""
    scale = 1 if name == "score" else 100
    points = axes.scatter(x, [scale * row["values"][name] for row in rows], zorder=3, **style)
    points.set_urls([_record(row, role) for row in rows])


def _record(row: Row, role: str) -> str:
    return f"records/{row['records'][role]}.json"


def _sweep(rows: Sequence[Row], axis: str) -> bytes:
    """ACC and ASR over the horizontal axis: a point per seed and case, lines through each defense's means."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (
        ("acc", COLOURS["clean"]),
        ("asr", COLOURS["backdoored"]),
        ("clean_asr", COLOURS["pale"]),
    ):
        for known, defense, line in _lines(rows, name):
            places = [r["facts"]["x"] for r in known]
            _linked(axes, places, known, name, "evaluate", color=colour, s=14)
            means = [
                (x, np.mean([100 * r["values"][name] for r in known if r["facts"]["x"] == x]))
                for x in sorted(set(places))
            ]
            axes.plot(*zip(*means, strict=True), line, color=colour, label=f"{_TITLES[name]}{defense}")
    axes.set_xlabel(axis or "setting")
    axes.set_ylabel("%")
    axes.set_ylim(-3, 103)
    axes.grid(axis="y")
    axes.legend()
    return to_svg(figure)


def _lines(rows: Sequence[Row], name: str) -> Iterator[tuple[list[Row], str, str]]:
    """The rows of each defense that have a place and a value, what its label ends on, and its line style."""
    known = [row for row in rows if "x" in row["facts"] and row["values"].get(name) is not None]
    defenses = list(dict.fromkeys(row["facts"].get("defense", "") for row in known))
    if name == "clean_asr" or len(defenses) < 2:  # the clean encoder is the same behind every defense
        defenses = defenses[:1]
    for place, defense in enumerate(defenses):
        label = f", {defense}" if len(defenses) > 1 else ""
        members = [row for row in known if row["facts"].get("defense", "") == defense]
        yield members, label, _STYLES[place % len(_STYLES)]


_STYLES = ("-", "--", ":", "-.")
_TITLES = {"acc": "ACC", "asr": "ASR", "clean_asr": "ASR of the clean encoder"}


def _heat(rows: Sequence[Row]) -> bytes:
    """ASR above the clean encoder's, attack by defense; a number is a link to the first record behind it."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["values"].get("asr") is not None:
            facts = row["facts"]
            cells.setdefault((facts["defense"], f"{facts['attack']}, {facts['task']}"), []).append(row)
    defenses, attacks = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    above = {
        key: np.mean([100 * (r["values"]["asr"] - (r["values"].get("clean_asr") or 0)) for r in members])
        for key, members in cells.items()
    }
    grid = np.array([[above.get((defense, attack), np.nan) for attack in attacks] for defense in defenses])
    figure = Figure(
        figsize=(max(4.6, 2.2 + 1.1 * len(attacks)), 0.9 + 0.42 * len(defenses)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="OrRd", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=20, ha="right")
    axes.set_yticks(range(len(defenses)), defenses)
    for (defense, attack), value in above.items():
        colour = "white" if value > 60 else COLOURS["neutral"]
        place = (attacks.index(attack), defenses.index(defense))
        text = axes.text(*place, str(round(value)), ha="center", va="center", color=colour)
        text.set_url(_record(cells[defense, attack][0], "evaluate"))
    figure.suptitle("ASR above the clean encoder's, points", size="medium")  # of the axes it would be cut
    return to_svg(figure)


def _maps(rows: Sequence[Row]) -> bytes:
    """Where images and the same images with the trigger lie in the feature space, in two dimensions."""
    shown = [row for row in rows if "map" in row["values"]][:6]
    figure = Figure(figsize=(3.4 * len(shown), 3.4), layout="constrained")
    for place, row in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), place)
        for kind in ("clean", "triggered"):
            points = np.array(row["values"]["map"].get(kind, [])).reshape(-1, 2)
            dots = axes.scatter(points[:, 0], points[:, 1], s=5, color=COLOURS[kind], label=f"{kind} images")
            dots.set_urls([_record(row, "evaluate")] * len(points))
        facts = row["facts"]
        axes.set_title(f"{facts['attack']}, {facts['defense']}, seed {facts['seed']}")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend()
    return to_svg(figure)


def _detectors(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["facts"]["detector"] for row in rows if "detector" in row["facts"]))


def _scores(rows: Sequence[Row]) -> bytes:
    """Scores of clean and of backdoored encoders with the threshold (DECREE, Figure 4)."""
    names = _detectors(rows)
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        for kind in ("clean", "backdoored"):
            found = [
                r
                for r in rows
                if (r["facts"].get("detector"), r["facts"].get("encoder")) == (name, kind)
                and r["values"]["score"] is not None
            ]
            places = list(range(len(found)))
            _linked(axes, places, found, "score", "scan", color=COLOURS[kind], label=kind, alpha=0.8)
        thresholds = {r["values"]["threshold"] for r in rows if r["facts"].get("detector") == name}
        for threshold in thresholds:
            axes.axhline(threshold, color=COLOURS["neutral"], linestyle="--", linewidth=1)
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_xlabel("encoders")
        axes.set_ylabel("score")
        axes.legend()
    return to_svg(figure)


def _roc(rows: Sequence[Row]) -> bytes:
    figure = Figure(figsize=(3.8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name in _detectors(rows):
        _draw_roc(axes, [row for row in rows if row["facts"].get("detector") == name], name)
    axes.plot([0, 1], [0, 1], color=COLOURS["pale"], linestyle=":")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right")
    return to_svg(figure)


def _draw_roc(axes: Axes, rows: Sequence[Row], name: str) -> None:
    cases = {row["records"]["scan"]: row for row in rows if row["values"]["score"] is not None}.values()
    truth = [row["facts"]["encoder"] == "backdoored" for row in cases]
    if len(set(truth)) < 2:
        return
    signs = [-1 if row["values"]["flagged"] == "below" else 1 for row in cases]
    scores = [sign * row["values"]["score"] for sign, row in zip(signs, cases, strict=True)]
    false, true, _ = roc_curve(truth, scores)
    axes.plot(false, true, label=name)


def _profile(rows: Sequence[Row]) -> bytes:
    """Dependence of each stage on the final features (MIMIC, Figure 3): a line per encoder."""
    names = list(dict.fromkeys(name for row in rows for name in row["values"]["profiles"]))
    measures = list(dict.fromkeys(name.split()[0] for name in names))
    figure = Figure(figsize=(4.4 * len(measures), 3.2), layout="constrained")
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), place)
        drawn = dict[str, Any]()
        for row in rows:
            for name, profile in row["values"]["profiles"].items():
                if name.split()[0] != measure:
                    continue
                kind, values = name.split()[1], [stage["held_out"] for stage in profile["stages"]]
                stages, attack = np.arange(1, len(values) + 1), row["facts"]["attack"]
                dashes = "--" if attack == NONE else "-"
                about = f"{kind} inputs, {'clean encoder' if attack == NONE else attack}"
                (drawn[about],) = axes.plot(stages, values, dashes, color=COLOURS[kind], alpha=0.8)
                points = axes.scatter(stages, values, color=COLOURS[kind], s=14, zorder=3)
                points.set_urls([_record(row, "profile")] * len(values))
        axes.set_xticks(stages)
        axes.set_xlabel("stage")
        axes.set_ylabel("nats" if measure == "mine" else measure.upper())
        axes.set_title(measure)
        axes.legend(drawn.values(), drawn)
    return to_svg(figure)
