"""The charts with bars and error bars: success rates, the dependence profile, beta."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from encoderguard.report.figures import COLOURS, plain, styled, to_svg

__all__ = ["Bar", "Stage", "beta_chart", "draw_rates", "profile_chart", "rates_chart"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a fraction, its interval (low, high) if known, and the values of single seeds."""

    value: float
    interval: tuple[float, float] | None = None
    seeds: Sequence[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Dependence of one stage on the final features, its error bar and its shuffle null."""

    tap: str
    held_out: float | None
    spread: float = 0.0
    train: float | None = None
    null: float | None = None
    null_spread: float = 0.0


def draw_rates(axes: Axes, groups: Mapping[str, Mapping[str, Bar]], colours: Mapping[str, str]) -> None:
    """Bars in per cent, one cluster per rate, one colour per encoder.

    Args:
        axes: where to draw.
        groups: encoder name to (rate name to bar); every rate that any encoder has gets a cluster.
        colours: encoder name to colour.
    """
    rates = list(dict.fromkeys(rate for bars in groups.values() for rate in bars))
    width = min(0.84 / len(groups), 0.34)
    for index, (encoder, bars) in enumerate(groups.items()):
        offset = (index - (len(groups) - 1) / 2) * width
        colour = colours.get(encoder, COLOURS["neutral"])
        places = [rates.index(rate) + offset for rate in bars]
        heights = [100 * bar.value for bar in bars.values()]
        axes.bar(places, heights, width * 0.92, color=colour, label=plain(encoder))
        for place, bar in zip(places, bars.values(), strict=True):
            _draw_spread(axes, place, width, bar)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("per cent")
    axes.set_xticks(range(len(rates)), rates)
    axes.set_xlim(-0.55, len(rates) - 0.45)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def _draw_spread(axes: Axes, place: float, width: float, bar: Bar) -> None:
    top = 100 * bar.value
    if bar.interval is not None:
        low, high = (100 * end for end in bar.interval)
        axes.vlines(place, low, high, color="#1E252B", linewidth=1.3, zorder=3)
        top = max(top, high)
    if len(bar.seeds) > 1:
        spots = place + width * 0.22 * np.linspace(-1, 1, len(bar.seeds))
        heights = [100 * seed for seed in bar.seeds]
        axes.scatter(spots, heights, s=9, color="white", edgecolors="#1E252B", linewidths=0.7, zorder=4)
        top = max(top, *heights)
    axes.annotate(
        f"{100 * bar.value:.1f}", (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=8.5
    )


def rates_chart(groups: Mapping[str, Mapping[str, Bar]], colours: Mapping[str, str]) -> bytes:
    """ACC and ASR of one or more encoders as SVG bytes."""
    with styled():
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        draw_rates(axes, groups, colours)
        if len(groups) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups), handlelength=1.0)
        return to_svg(figure)


def profile_chart(measure: str, clean: Sequence[Stage], triggered: Sequence[Stage]) -> bytes:
    """Dependence of each stage on the final features, shallow to deep (Figure 3 of MIMIC).

    Held-out values with their spread; dotted, the value on the samples the measure was fitted to; the grey
    band is what remains when the pairing is shuffled.
    """
    with styled():
        figure = Figure(figsize=(4.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        taps = list(dict.fromkeys(stage.tap for stage in [*clean, *triggered]))
        _draw_null(axes, taps, clean or triggered)
        both = bool(clean and triggered)
        drawn = [("clean inputs", clean, "clean", -0.04), ("triggered inputs", triggered, "triggered", 0.04)]
        for label, stages, colour, shift in drawn:
            _draw_profile(axes, taps, stages, label, COLOURS[colour], shift if both else 0.0)
        axes.set_xticks(range(len(taps)), [plain(tap, 14) for tap in taps])
        if len(taps) > 5:
            axes.tick_params(axis="x", rotation=30)
        axes.set_ylabel(plain(measure, 40))
        axes.margins(y=0.12)
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8.5)
        return to_svg(figure)


def _draw_null(axes: Axes, taps: Sequence[str], stages: Sequence[Stage]) -> None:
    known = [stage for stage in stages if stage.null is not None]
    if not known:
        return
    middle = np.array([stage.null for stage in known], dtype=np.float64)
    spread = np.array([stage.null_spread for stage in known])
    places = np.array([taps.index(stage.tap) for stage in known], dtype=np.float64)
    if len(known) == 1:
        places, middle, spread = places + np.array([-0.3, 0.3]), middle.repeat(2), spread.repeat(2)
    axes.fill_between(
        places, middle - spread, middle + spread, color=COLOURS["pale"], alpha=0.35, linewidth=0
    )
    axes.plot(places, middle, color=COLOURS["pale"], linewidth=1.4, label="shuffled pairs")


def _draw_profile(
    axes: Axes, taps: Sequence[str], stages: Sequence[Stage], label: str, colour: str, shift: float
) -> None:
    known = [(taps.index(s.tap) + shift, s.held_out, s.spread) for s in stages if s.held_out is not None]
    if known:
        places, values, spreads = zip(*known, strict=True)
        axes.errorbar(
            places,
            values,
            yerr=spreads,
            color=colour,
            marker="o",
            markersize=5.5,
            linewidth=1.8,
            capsize=3,
            label=label,
        )
    fitted = [(taps.index(s.tap) + shift, s.train) for s in stages if s.train is not None]
    if fitted:
        axes.plot(
            *zip(*fitted, strict=True),
            color=colour,
            linestyle=":",
            linewidth=1.4,
            label=f"{label.split()[0]}, fitted",
        )


def beta_chart(names: Sequence[str], values: Sequence[float]) -> bytes:
    """The weight of each stage in the attention loss."""
    with styled():
        figure = Figure(figsize=(4.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(values)), values, 0.62, color=COLOURS["purified"])
        axes.bar_label(bars, [f"{value:.2g}" for value in values], padding=3, fontsize=9)
        axes.set_xticks(range(len(names)), [plain(name, 14) for name in names])
        if len(names) > 4:
            axes.tick_params(axis="x", rotation=30)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("weight β")
        axes.margins(y=0.14)
        axes.grid(axis="y")
        return to_svg(figure)
