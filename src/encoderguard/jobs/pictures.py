"""The arrays that a report draws: a few pictures, triggers, maps of features. About a megabyte at most."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Poisoned, Reference
from encoderguard.run import Run
from encoderguard.storage import write_atomic
from encoderguard.triggers import Trigger

__all__ = ["Arrays", "as_pictures", "embeddings", "examples", "planar", "poisons", "write_arrays"]

Arrays = dict[str, NDArray[np.generic]]
_PICTURES = 8
_POINTS = 400
_SIDE = 128  # larger pictures would make the report heavy


def examples(
    images: ImageSet, trigger: Trigger | None = None, references: Sequence[Reference] = ()
) -> Arrays:
    """``images`` and, with a trigger, ``stamped``: uint8 ``[n, H, W, 3]``; ``reference`` likewise.

    Raises:
        ImageError: the trigger does not fit the images.
    """
    pixels = images.take(torch.arange(min(_PICTURES, len(images))))
    found = {"images": as_pictures(pixels)}
    if trigger is not None:
        found["stamped"] = as_pictures((trigger(pixels.float() / 255) * 255).round().clamp(0, 255).byte())
    sides = {reference.image.shape for reference in references}
    if len(sides) == 1:
        found["reference"] = as_pictures(
            torch.stack([reference.image for reference in references[:_PICTURES]])
        )
    return found


def poisons(clean: ImageSet, poisoned: Poisoned) -> Arrays:
    """The first poisons beside what they replaced (``images``, ``stamped``), or appended (``canvases``).

    Where canvases were appended, ``images`` and ``stamped`` show the trigger as a test image gets it.
    """
    canvases = poisoned.images.canvases
    if canvases is not None:
        return examples(clean, poisoned.trigger) | {"canvases": as_pictures(canvases[:_PICTURES])}
    some = poisoned.indices[:_PICTURES]
    return {"images": as_pictures(clean.take(some)), "stamped": as_pictures(poisoned.images.take(some))}


def embeddings(
    encoders: dict[str, Encoder], images: ImageSet, *, run: Run, trigger: Trigger | None = None
) -> Arrays:
    """Features of up to 400 images in the plane: one float32 ``[n, 2]`` per name, on common axes.

    Args:
        encoders: name of the array to encoder. With a trigger, ``NAME_triggered`` holds the stamped images.
        images: the first ones are taken.
        run: surroundings.
        trigger: stamped on the images.
    """
    first = images.take(torch.arange(min(_POINTS, len(images))))
    some = ImageSet.from_arrays(first, name=images.name)  # canvases, if there are any, are left out
    features: dict[str, Tensor] = {}
    for name, encoder in encoders.items():
        features[name] = extract(encoder, some, run=run)
        if trigger is not None:
            features[f"{name}_triggered"] = extract(encoder, some, run=run, trigger=trigger)
    if len({table.shape[1] for table in features.values()}) > 1:  # no common axes
        return {name: planar([table])[0] for name, table in features.items()}
    return dict(zip(features, planar(list(features.values())), strict=True))


def planar(tables: Sequence[Tensor]) -> list[NDArray[np.generic]]:
    """Project rows ``[n_i, D]``, normalised to length 1, onto the two principal axes of all together."""
    rows = [torch.nn.functional.normalize(table.double(), dim=1) for table in tables]
    together = torch.cat(rows)
    centre = together.mean(0)
    axes = torch.linalg.svd(together - centre, full_matrices=False).Vh[:2]
    strongest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * strongest.sign()  # an axis has no direction of its own
    flat = [(table - centre) @ axes.T for table in rows]
    return [torch.nn.functional.pad(table, (0, 2 - table.shape[1])).float().numpy() for table in flat]


def write_arrays(arrays: Arrays, path: Path) -> Path:
    """Write ``arrays.npz`` atomically; plain arrays only."""

    def fill(part: Path) -> None:
        with part.open("wb") as stream:  # given a path, NumPy would add its own suffix
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    return write_atomic(path, fill)


def as_pictures(pixels: Tensor) -> NDArray[np.generic]:
    """uint8 ``[n, 3, H, W]`` as the report wants them: ``[n, H, W, 3]``, at most 128 pixels a side."""
    step = _step(pixels)
    return pixels[..., ::step, ::step].permute(0, 2, 3, 1).contiguous().numpy()


def _step(pixels: Tensor) -> int:
    return max(1, -(-max(pixels.shape[-2:]) // _SIDE))
