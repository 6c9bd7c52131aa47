"""The charts of a report, as SVG bytes. Same input, same bytes; no global plotting state is left behind."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

__all__ = [
    "COLOURS",
    "Row",
    "curve_chart",
    "draw_map",
    "map_chart",
    "plain",
    "score_chart",
    "styled",
    "to_svg",
]

# Okabe and Ito's colours: they stay apart for colour-blind readers and in grey print.
COLOURS = {
    "clean": "#0072B2",
    "backdoored": "#D55E00",
    "purified": "#009E73",
    "neutral": "#4C5763",
    "pale": "#A9B4BF",
    "triggered": "#D55E00",
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "encoderguard",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name out of a record may hold a dollar sign
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A96A3",
    "axes.labelcolor": "#2B333B",
    "axes.titlesize": 10.0,
    "axes.axisbelow": True,
    "text.color": "#2B333B",
    "xtick.color": "#4C5763",
    "ytick.color": "#4C5763",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "grid.color": "#E3E8ED",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}
_MOST_VECTOR_POINTS = 1500


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the score chart: a name and its scores."""

    name: str
    scores: Sequence[float]
    colour: str
    strong: bool = False


def plain(label: str, most: int = 26) -> str:
    """A label that every font can draw: ASCII, one line, not too long."""
    safe = "".join(c if 32 <= ord(c) < 127 else "?" for c in label)
    return safe if len(safe) <= most else safe[: most - 3] + "..."


@contextmanager
def styled() -> Iterator[None]:
    """The house style for the time of one drawing."""
    with matplotlib.rc_context(_STYLE):
        yield


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG bytes without date or version."""
    stream = io.BytesIO()
    figure.savefig(
        stream,
        format="svg",
        dpi=220,
        metadata={"Date": None, "Creator": None},
    )
    return stream.getvalue()


def score_chart(
    rows: Sequence[Row], threshold: float | None, flagged: str | None, clean_from: float | None = None
) -> bytes:
    """Scores on one axis.

    Args:
        rows: from top to bottom.
        threshold: drawn as a dashed line.
        flagged: the side of the threshold that is shaded, "below" or "above"; None shades neither.
        clean_from: from the threshold to here a score carries no verdict; shaded in grey.
    """
    with styled():
        figure = Figure(figsize=(5.2, 0.85 + 0.4 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for height, row in enumerate(reversed(rows)):
            marker: dict[str, Any] = {"s": 42, "marker": "o", "alpha": 0.75}
            marker |= {"s": 90, "marker": "D", "alpha": 1.0} if row.strong else {}
            axes.scatter(
                row.scores,
                [height] * len(row.scores),
                color=row.colour,
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
                **marker,
            )
        everything = [score for row in rows for score in row.scores]
        everything += [edge for edge in (threshold, clean_from) if edge is not None]
        low, high = min([0.0, *everything]), max([0.0, *everything])
        margin = 0.06 * (high - low) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_yticks(range(len(rows)), [plain(row.name, 30) for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("score")
        if threshold is not None:
            _draw_threshold(axes, threshold, flagged, clean_from)
        return to_svg(figure)


def _draw_threshold(axes: Axes, threshold: float, flagged: str | None, clean_from: float | None) -> None:
    axes.axvline(threshold, color=COLOURS["neutral"], linestyle=(0, (4, 3)), linewidth=1.2)
    label = f"threshold {threshold:.3g}"
    axes.annotate(
        label,
        (threshold, 1),
        (0, 4),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    low, high = axes.get_xlim()
    if flagged in ("below", "above"):
        start, end = (low, threshold) if flagged == "below" else (threshold, high)
        axes.axvspan(start, end, color=COLOURS["backdoored"], alpha=0.10, linewidth=0)
    if clean_from is not None:
        axes.axvspan(threshold, clean_from, color=COLOURS["pale"], alpha=0.25, linewidth=0)


def curve_chart(name: str, lines: Sequence[Sequence[float]]) -> bytes:
    """One small panel of a training curve: one line per run or restart."""
    with styled():
        figure = Figure(figsize=(3.1, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            style: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(line) < 16 else {}
            axes.plot(
                range(1, len(line) + 1),
                line,
                color=COLOURS["clean"],
                alpha=1.0 if len(lines) == 1 else 0.6,
                linewidth=1.5,
                **style,
            )
        axes.set_title(plain(name, 40), loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid()
        return to_svg(figure)


def draw_map(
    axes: Axes, clean: NDArray[np.float64] | None, triggered: NDArray[np.float64] | None, size: float = 11
) -> None:
    """Scatter clean points ``[n, 2]`` in grey and triggered ones in colour, on square axes without ticks."""
    drawn = [("clean images", clean, COLOURS["pale"]), ("with trigger", triggered, COLOURS["triggered"])]
    total = sum(len(rows) for _, rows, _ in drawn if rows is not None)
    for label, rows, colour in drawn:
        if rows is not None:
            axes.scatter(
                rows[:, 0],
                rows[:, 1],
                s=size,
                color=colour,
                alpha=0.65,
                linewidths=0,
                label=label,
                rasterized=total > _MOST_VECTOR_POINTS,
            )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.07)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#D5DCE3")


def map_chart(clean: NDArray[np.float64] | None, triggered: NDArray[np.float64] | None) -> bytes:
    """One embedding map with its legend."""
    with styled():
        figure = Figure(figsize=(3.3, 3.5), layout="constrained")
        axes = figure.add_subplot()
        draw_map(axes, clean, triggered)
        if clean is not None and triggered is not None:
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, markerscale=1.6, handletextpad=0.2
            )
        return to_svg(figure)
