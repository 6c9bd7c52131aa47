"""The parts of a page that a search over families of triggers fills: curves, what was found, seconds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from encoderguard.report import reading
from encoderguard.report.blocks import Block, Gallery, Note, Table, chart, pixels
from encoderguard.report.figures import COLOURS, plain, styled, to_svg
from encoderguard.report.pixels import pictures, stacked
from encoderguard.report.values import duration, mapping, number, numbers, short, text

__all__ = ["families", "found", "stages"]

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray[np.generic]]


def _entries(record: Record) -> dict[str, dict[str, Any]]:
    told = mapping(reading.lookup(record, "families"))
    return {name: mapping(entry) for name, entry in told.items() if mapping(entry).get("levels")}


def families(record: Record, arrays: Arrays) -> list[Block]:
    """One curve of collapse over strength per family, with the range of clean encoders, and a table."""
    entries = _entries(record)
    panels = [
        chart(collapse_chart(name, entry), f"Collapse over strength, family {name}")
        for name, entry in entries.items()
        if len(numbers(entry.get("collapse"))) == len(numbers(entry.get("levels")))
    ]
    if not panels:
        return []
    tuned = mapping(mapping(reading.lookup(record, "collapse_of_found_triggers")).get("after tuning"))
    rows = [
        [
            name,
            _short(entry.get("statistic")),
            _span(mapping(entry.get("null_statistics"))),
            _short(entry.get("p")),
            _short(entry.get("p_adjusted")),
            _transfer(record, name),
            _short(tuned.get(name)),
        ]
        for name, entry in entries.items()
    ]
    caption = (
        "How alike features of different images become (0: as clean images, 1: all the same) under the best "
        "trigger found, over its strength. Orange: this encoder. Blue: the range of those compared with."
    )
    header = ["family", "statistic", "of the others", "p", "p, Holm", "found trigger on the others"]
    note = (
        "Statistic: mean of the curve in Fisher's z. A trigger that works on the others too is a natural "
        "weakness rather than a backdoor. Last column: after a few clean training steps."
    )
    return [
        Gallery(pictures=panels, shape="curves", caption=caption),
        Table(header=[*header, "after tuning"], rows=rows, caption=note),
        *_displacements(entries),
    ]


def _displacements(entries: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Per family the candidate that moves the features furthest beside the clean encoders."""
    rows = []
    for name, entry in entries.items():
        if told := mapping(entry.get("moved")):
            others = _span(mapping(told.get("null_statistics")))
            values = (told.get(key) for key in ("displacement", "statistic", "p", "p_adjusted"))
            own, statistic, p, adjusted = map(_short, values)
            there = _span(mapping(told.get("on_clean")))
            rows.append([name, text(told.get("label")), own, there, statistic, others, p, adjusted])
    if not rows:
        return []
    note = (
        "Displacement: 1 minus the mean cosine of an image and its stamped copy, 0 if nothing moves. "
        "Statistic: the logarithm of its ratio to that on the others, less the median over all candidates."
    )
    header = ["family", "candidate", "displacement", "on the others", "statistic", "of the others", "p"]
    return [Table(header=[*header, "p, Holm"], rows=rows, caption=note)]


def _short(value: object) -> str:
    known = number(value)
    return "" if known is None else short(known)


def _span(values: Mapping[str, Any]) -> str:
    known = numbers(list(values.values()))
    return f"{short(min(known))} to {short(max(known))}" if known else ""


def _transfer(record: Record, family: str) -> str:
    told = mapping(reading.lookup(record, "collapse_of_found_triggers"))
    own = ("on the suspect", "after tuning")
    values = {name: mapping(entry).get(family) for name, entry in told.items() if name not in own}
    return _span(values)


def collapse_chart(name: str, entry: Mapping[str, Any]) -> bytes:
    """One family's curve, and the band of the null if the entry holds one."""
    levels, curve = numbers(entry.get("levels")), numbers(entry.get("collapse"))
    low, high = numbers(entry.get("null_low")), numbers(entry.get("null_high"))
    with styled():
        figure = Figure(figsize=(3.1, 2.1), layout="constrained")
        axes = figure.add_subplot()
        if len(low) == len(high) == len(levels):
            axes.fill_between(levels, low, high, color=COLOURS["clean"], alpha=0.25, linewidth=0)
            axes.plot(levels, high, color=COLOURS["clean"], linewidth=1)
        axes.plot(levels, curve, color=COLOURS["backdoored"], marker="o", markersize=3.5, linewidth=1.5)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(plain(name, 40), loc="left")
        axes.set_xlabel(plain(text(entry.get("unit")), 44), fontsize=8)
        axes.grid()
        return to_svg(figure)


def found(record: Record, arrays: Arrays) -> list[Block]:
    """The best trigger of each family on real images, and the clean images nearest to the collapse."""
    told = mapping(mapping(reading.lookup(record, "collapse_of_found_triggers")).get("on the suspect"))
    blocks: list[Block] = []
    for name in _entries(record):
        stamped, change = pictures(arrays, f"found_{name}"), pictures(arrays, f"change_{name}")
        if not stamped or len(stamped) != len(change):
            continue
        tiles = [
            pixels(stacked(above, below), f"{name}: stamped image {k} above its change")
            for k, (above, below) in enumerate(zip(stamped, change, strict=True), 1)
        ]
        value = number(told.get(name))
        caption = f"{name}{'' if value is None else f': collapse {short(value)}'}."
        blocks.append(Gallery(pictures=tiles, shape="thumbs", caption=caption))
    if blocks:
        how = "Above: stamped. Below: the change, grey where there is none, the largest at full scale."
        blocks.append(Note(text=how))
    nearest = [
        pixels(image, f"Nearest clean image {k}") for k, image in enumerate(pictures(arrays, "nearest"), 1)
    ]
    if nearest:
        cosines = numbers(reading.lookup(record, "nearest_cosines"))
        told_by = f", with cosines from {short(max(cosines))} to {short(min(cosines))}" if cosines else ""
        caption = (
            "The clean images whose features lie nearest to where the best trigger sends all images"
            f"{told_by}. "
            "A planted backdoor often sends them to one kind of image; a natural weakness to none."
        )
        blocks.append(Gallery(pictures=nearest, shape="thumbs", caption=caption))
    return blocks


def stages(record: Record, arrays: Arrays) -> list[Block]:
    """Seconds of each part of the scan."""
    told = {name: number(value) for name, value in mapping(reading.lookup(record, "seconds")).items()}
    rows = [[name.replace("_", ", "), duration(value)] for name, value in told.items() if value]
    return [Table(header=["part", "time"], rows=rows)] if rows else []
