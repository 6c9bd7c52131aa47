"""The papers' figures, redrawn from the rows of a result."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from encoderguard.report.figures import COLOURS, styled

__all__ = ["figures"]

Row = Mapping[str, Any]


def figures(result: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: what the kind of the result and its rows allow."""
    rows = [row for row in result["rows"] if not row["failed"]]
    made: dict[str, bytes] = {}
    with styled():
        if any("x" in row["facts"] and "defense" in row["facts"] for row in rows):
            made["sweep"] = _sweep(rows, result["axis"])
        if any("defense" in row["facts"] for row in rows):
            made["heat"] = _heat(rows)
        if any("detector" in row["facts"] for row in rows):
            made |= {"scores": _scores(rows), "roc": _roc(rows)}
        if result["kind"] == "profile" and rows:
            made["profile"] = _profile(rows)
    return made


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=140, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def _sweep(rows: Sequence[Row], axis: str) -> bytes:
    """ACC and ASR over the horizontal axis; bars are the standard deviation over seeds and cases."""
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.add_subplot()
    points = sorted({row["facts"]["x"] for row in rows if "x" in row["facts"]})
    for name, colour in (
        ("acc", COLOURS["clean"]),
        ("asr", COLOURS["backdoored"]),
        ("clean_asr", COLOURS["pale"]),
    ):
        values = [
            [
                100 * r["values"][name]
                for r in rows
                if r["facts"].get("x") == x and r["values"].get(name) is not None
            ]
            for x in points
        ]
        known = [(x, np.mean(v), np.std(v)) for x, v in zip(points, values, strict=True) if v]
        if known:
            place, mean, spread = zip(*known, strict=True)
            axes.errorbar(place, mean, spread, marker="o", capsize=3, color=colour, label=_TITLES[name])
    axes.set_xlabel(axis or "setting")
    axes.set_ylabel("%")
    axes.set_ylim(-3, 103)
    axes.grid(axis="y")
    axes.legend()
    return _png(figure)


_TITLES = {"acc": "ACC", "asr": "ASR", "clean_asr": "ASR of the clean encoder"}


def _heat(rows: Sequence[Row]) -> bytes:
    """ASR above the clean encoder's, attack by defense."""
    kept = [row for row in rows if row["values"].get("asr") is not None]
    attacks = list(dict.fromkeys(f"{r['facts']['attack']}, {r['facts']['task']}" for r in kept))
    defenses = list(dict.fromkeys(r["facts"]["defense"] for r in kept))
    grid = np.full((len(defenses), len(attacks)), np.nan)
    for i, defense in enumerate(defenses):
        for j, attack in enumerate(attacks):
            found = [
                100 * (r["values"]["asr"] - (r["values"].get("clean_asr") or 0))
                for r in kept
                if r["facts"]["defense"] == defense
                and f"{r['facts']['attack']}, {r['facts']['task']}" == attack
            ]
            grid[i, j] = np.mean(found) if found else np.nan
    figure = Figure(figsize=(1.6 + 1.1 * max(1, len(attacks)), 0.9 + 0.42 * max(1, len(defenses))))
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="OrRd", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=20, ha="right")
    axes.set_yticks(range(len(defenses)), defenses)
    for (i, j), value in np.ndenumerate(grid):
        colour = "white" if value > 60 else COLOURS["neutral"]
        axes.text(j, i, "-" if np.isnan(value) else f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_title("ASR above the clean encoder's, points")
    return _png(figure)


def _detectors(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["facts"]["detector"] for row in rows if "detector" in row["facts"]))


def _scores(rows: Sequence[Row]) -> bytes:
    """Scores of clean and of backdoored encoders with the threshold (DECREE, Figure 4)."""
    names = _detectors(rows)
    figure = Figure(figsize=(4.2 * len(names), 3.2))
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        for kind in ("clean", "backdoored"):
            scores = [
                r["values"]["score"]
                for r in rows
                if (r["facts"].get("detector"), r["facts"].get("encoder")) == (name, kind)
                and r["values"]["score"] is not None
            ]
            axes.scatter(np.arange(len(scores)), scores, color=COLOURS[kind], label=kind, alpha=0.8)
        thresholds = {r["values"]["threshold"] for r in rows if r["facts"].get("detector") == name}
        for threshold in thresholds:
            axes.axhline(threshold, color=COLOURS["neutral"], linestyle="--", linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("encoder")
        axes.set_ylabel("score")
        axes.legend()
    figure.tight_layout()
    return _png(figure)


def _roc(rows: Sequence[Row]) -> bytes:
    figure = Figure(figsize=(3.8, 3.6))
    axes = figure.add_subplot()
    for name in _detectors(rows):
        _draw_roc(axes, [row for row in rows if row["facts"].get("detector") == name], name)
    axes.plot([0, 1], [0, 1], color=COLOURS["pale"], linestyle=":")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right")
    return _png(figure)


def _draw_roc(axes: Axes, rows: Sequence[Row], name: str) -> None:
    cases = {row["records"]["scan"]: row for row in rows if row["values"]["score"] is not None}.values()
    truth = [row["facts"]["encoder"] == "backdoored" for row in cases]
    if len(set(truth)) < 2:
        return
    signs = [-1 if row["values"]["direction"] == "small" else 1 for row in cases]
    scores = [sign * row["values"]["score"] for sign, row in zip(signs, cases, strict=True)]
    false, true, _ = roc_curve(truth, scores)
    axes.plot(false, true, label=name)


def _profile(rows: Sequence[Row]) -> bytes:
    """Dependence of each stage on the final features (MIMIC, Figure 3)."""
    names = list(dict.fromkeys(name for row in rows for name in row["values"]["profiles"]))
    measures = list(dict.fromkeys(name.split()[0] for name in names))
    figure = Figure(figsize=(4.4 * len(measures), 3.2))
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), place)
        for name in (name for name in names if name.startswith(measure)):
            lines = [row["values"]["profiles"].get(name) for row in rows]
            values = np.array([[s["held_out"] for s in line["stages"]] for line in lines if line])
            kind = name.split()[1]
            axes.errorbar(
                np.arange(1, values.shape[1] + 1),
                values.mean(0),
                values.std(0),
                marker="o",
                capsize=3,
                label=f"{kind} inputs",
                color=COLOURS[kind],
            )
        axes.set_xlabel("stage")
        axes.set_ylabel("nats" if measure == "mine" else measure.upper())
        axes.set_title(measure)
        axes.legend()
    figure.tight_layout()
    return _png(figure)
