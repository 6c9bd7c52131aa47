"""What a trigger looks like: clean pictures, stamped ones, and their amplified difference."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encoderguard.images import ImageSet
from encoderguard.jobs.pictures import Arrays
from encoderguard.report.pixels import pictures
from encoderguard.report.sheets import sheet
from encoderguard.storage import write_atomic
from encoderguard.triggers import Trigger, stamp_uint8

__all__ = ["contact_sheet", "trigger_facts", "trigger_views"]

# How the difference is drawn, up to which largest change in 1/255: faint ones tenfold, so that they are seen,
# a white square halved, so that nothing is cut off. (Tenfold, the few pixels beyond 12 are cut.)
_AMPLIFIED = ((10.0, 25.0), (2.0, 63.0), (0.5, 255.0))


def trigger_views(images: ImageSet, trigger: Trigger, count: int = 6) -> Arrays:
    """The first pictures of a set: ``images``, ``stamped`` and ``difference``, uint8 ``[count, H, W, 3]``.

    The difference is around mid-grey: times 10 if no pixel changes by more than 25/255, times 2 up to 63/255,
    else halved. ``factor``, float64 ``[1]``, says which.

    Raises:
        ImageError: the trigger does not fit the images.
    """
    clean, stamped = _pair(images, trigger, count)
    change = stamped.float() - clean.float()
    factor = next(factor for factor, most in _AMPLIFIED if float(change.abs().max()) <= most)
    difference = (128 + factor * change).round().clamp(0, 255).to(torch.uint8)
    found = {"images": clean, "stamped": stamped, "difference": difference}
    views: Arrays = {name: pixels.permute(0, 2, 3, 1).contiguous().numpy() for name, pixels in found.items()}
    return views | {"factor": np.array([factor])}


def trigger_facts(images: ImageSet, trigger: Trigger, count: int = 256) -> dict[str, float]:
    """How far stamped uint8 pictures are from the first clean ones of a set.

    ``peak`` is the largest change in units of 1/255, ``psnr`` is in dB (infinite without a change),
    ``changed`` is the share of pixels that change in a picture.

    Raises:
        ImageError: the trigger does not fit the images.
    """
    clean, stamped = (pixels.double() for pixels in _pair(images, trigger, count))
    change = stamped - clean
    mean_square = float(change.square().mean())
    return {
        "peak": float(change.abs().max()),
        "psnr": 20 * math.log10(255) - 10 * math.log10(mean_square) if mean_square else math.inf,
        "changed": float((change != 0).any(1).double().mean()),
    }


def contact_sheet(images: ImageSet, trigger: Trigger, path: Path, count: int = 6) -> Path:
    """Write a PNG of the first pictures: clean, stamped, and their difference around grey.

    Raises:
        ImageError: the trigger does not fit the images.
        OutputError: the path cannot be written.
        StorageError: the disk is full or failed.
    """
    views, facts = trigger_views(images, trigger, count), trigger_facts(images, trigger)
    times = f"difference ×\u00a0{views['factor'].item():g}"
    captions = {"images": "clean", "stamped": "triggered", "difference": times}
    rows = {caption: pictures(views, name, count) for name, caption in captions.items()}
    note = (
        f"{images.name}. Largest change {facts['peak']:.0f}/255, PSNR {facts['psnr']:.1f} dB, "
        f"{100 * facts['changed']:.1f} % of the pixels change."
    )
    content = sheet(rows, title=trigger.title, note=note)

    def fill(part: Path) -> None:
        part.write_bytes(content)

    return write_atomic(path, fill)


def _pair(images: ImageSet, trigger: Trigger, count: int) -> tuple[Tensor, Tensor]:
    clean = images.take(torch.arange(min(count, len(images))))
    return clean, stamp_uint8(trigger, clean)
