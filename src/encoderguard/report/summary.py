"""The one picture that tells the story: examples, rates before and after, maps of the features."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from numpy.typing import NDArray

from encoderguard.report import reading
from encoderguard.report.bars import draw_rates
from encoderguard.report.figures import COLOURS, draw_map, plain, styled
from encoderguard.report.pixels import pictures

__all__ = ["summary_figure"]

Arrays = Mapping[str, NDArray[Any]]
_COLUMNS = 4


def summary_figure(record: Mapping[str, Any], arrays: Arrays) -> bytes:
    """A PNG, 1600 x 1060 pixels: stamped examples, ACC and ASR by encoder, maps of the features.

    Args:
        record: the record of a demo or an evaluation; what it lacks leaves its panel out.
        arrays: as for ``render``.
    """
    with styled():
        figure = Figure(figsize=(10.0, 6.625), dpi=160)
        maps = reading.embedding_maps(arrays)[:3]
        groups = reading.rate_groups(record)
        rows = figure.add_gridspec(
            2, 1, height_ratios=[1, 1.08], hspace=0.24, left=0.035, right=0.985, top=0.91, bottom=0.06
        )
        top = rows[0].subgridspec(1, 2, width_ratios=[1, 1.12], wspace=0.16)
        _draw_examples(figure, top[0], arrays)
        if groups:
            _draw_rates(figure, top[1], groups)
        if maps:
            _draw_maps(figure, rows[1], maps)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        return stream.getvalue()


def _draw_examples(figure: Figure, place: SubplotSpec, arrays: Arrays) -> None:
    named = [("images as given", "images"), ("with the trigger", "stamped")]
    rows = [(name, found) for name, key in named if (found := pictures(arrays, key, _COLUMNS))]
    if not rows:
        return
    grid = place.subgridspec(len(rows), _COLUMNS, wspace=0.05, hspace=0.22)
    for height, (name, images) in enumerate(rows):
        for column, image in enumerate(images):
            axes = figure.add_subplot(grid[height, column])
            axes.imshow(image, interpolation="nearest", vmin=0, vmax=255)
            axes.set_axis_off()
            axes.set_anchor("S")
            if column == 0:
                axes.set_title(name, loc="left", fontsize=11)


def _draw_rates(figure: Figure, place: SubplotSpec, groups: Mapping[str, Mapping[str, Any]]) -> None:
    axes = figure.add_subplot(place)
    draw_rates(axes, groups, reading.GROUP_COLOURS)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=len(groups), handlelength=1.0, fontsize=11
    )


def _draw_maps(figure: Figure, place: SubplotSpec, maps: list[reading.Map]) -> None:
    grid = place.subgridspec(1, 3, wspace=0.06)
    for column, (title, clean, triggered) in enumerate(maps):
        axes = figure.add_subplot(grid[0, column])
        draw_map(axes, clean, triggered, size=14)
        name = title if title.endswith("encoder") else f"features of the {title} encoder"
        axes.set_title(
            plain(name, 40), fontsize=11, color=reading.GROUP_COLOURS.get(title, COLOURS["neutral"])
        )
        if column == 0:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="lower center", ncols=2, markerscale=2, handletextpad=0.2, fontsize=11
            )
