"""The parts of a page that come from arrays: example images, recovered triggers, maps of the features."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoderguard.report import reading
from encoderguard.report.blocks import Block, Gallery, Note, chart, pixels
from encoderguard.report.figures import map_chart
from encoderguard.report.pixels import field_of, heat, pictures, stacked, trigger_on_grey
from encoderguard.report.values import count, mapping, short

__all__ = ["examples", "maps", "triggers"]

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray[np.generic]]

_SCAN_MAP = (
    " The recovered trigger was searched for so that it brings the coloured points together, which succeeds "
    "for clean encoders too: what counts is how small a trigger is enough."
)
_TRIGGER_MAP = (
    " A backdoor shows as triggered images that collapse into one spot away from their clean copies."
)


def examples(record: Record, arrays: Arrays) -> list[Block]:
    """Images with the trigger under the same images without it, and the attacker's reference."""
    plain, stamped = pictures(arrays, "images"), pictures(arrays, "stamped")
    blocks: list[Block] = []
    pairs = min(len(plain), len(stamped))
    if pairs:
        tiles = [
            pixels(
                stacked(plain[k], stamped[k]), f"Image {k + 1}, without the trigger above and with it below"
            )
            for k in range(pairs)
        ]
        job = record.get("job")
        origin = "the recovered trigger" if job == "scan" else "the trigger"
        caption = f"Above: as given. Below: {'poisoned' if _replaced(record) else f'with {origin}'}."
        blocks.append(Gallery(pictures=tiles, shape="thumbs", caption=caption))
    elif plain or stamped:
        tiles = [pixels(image, f"Image {k}") for k, image in enumerate(plain or stamped, 1)]
        blocks.append(Gallery(pictures=tiles, shape="thumbs", caption="" if plain else "With the trigger."))
    appended = [
        pixels(image, f"Appended picture {k}") for k, image in enumerate(pictures(arrays, "canvases"), 1)
    ]
    if appended:
        caption = "Appended to the training set: two crops of one such picture often show one half each."
        blocks.append(Gallery(pictures=appended, shape="tiles", caption=caption))
    reference = [
        pixels(image, f"Reference image {k}") for k, image in enumerate(pictures(arrays, "reference"), 1)
    ]
    if reference:
        caption = "The attacker's reference: stamped images are given features like these."
        blocks.append(Gallery(pictures=reference, shape="thumbs", caption=caption))
    return blocks


def _replaced(record: Record) -> bool:
    """Whether the pictures below are poisons themselves, not test images with the trigger."""
    return record.get("job") == "poison" and bool(mapping(record.get("counts")).get("replaced"))


def triggers(record: Record, arrays: Arrays) -> list[Block]:
    """Mask and pattern of every recovered trigger, and what it does to a grey image."""
    blocks: list[Block] = []
    for suffix in ("", *(f"_{name}" for name in reading.ENCODERS)):
        mask, pattern = field_of(arrays, f"mask{suffix}", 2), field_of(arrays, f"pattern{suffix}", 3)
        if mask is None:
            continue
        who = f"{suffix[1:]}: " if suffix else ""
        tiles = [pixels(heat(mask), "Mask: how much of each pixel the trigger replaces", f"{who}mask")]
        if pattern is not None:
            tiles.append(
                pixels(pictures({"p": pattern}, "p")[0], "Pattern: the colours of the trigger", "pattern")
            )
            together = trigger_on_grey(mask, pattern)
            tiles += [] if together is None else [pixels(together, "The trigger on a grey image", "on grey")]
        size = f"Mean of the mask {short(float(mask.mean()))}, largest value {short(float(mask.max()))}."
        blocks.append(Gallery(pictures=tiles, shape="tiles", caption=size))
    if blocks:
        how = (
            "Mask: black keeps the pixel, pale yellow replaces it. A smaller one is the stronger indication."
        )
        blocks.append(Note(text=how))
    return blocks


def maps(record: Record, arrays: Arrays) -> list[Block]:
    """Projections of the features: clean images in grey, triggered ones in colour."""
    found = reading.embedding_maps(arrays)
    if not found:
        return []
    panels = []
    for title, clean, triggered in found:
        amounts = [(clean, "clean image"), (triggered, "triggered image")]
        words = " and ".join(count(len(rows), noun) for rows, noun in amounts if rows is not None)
        panels.append(chart(map_chart(clean, triggered), f"Map of {words}, {title}", title))
    caption = "The features, projected onto two axes."
    if any(triggered is not None for _, _, triggered in found):
        caption += _SCAN_MAP if record.get("job") == "scan" else _TRIGGER_MAP
    return [Gallery(pictures=panels, shape="panels", caption=caption)]
