"""Arrays of what a scan found: triggers on real images, and the images nearest to where they collapse."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encoderguard.images import ImageSet
from encoderguard.jobs.pictures import Arrays, as_pictures
from encoderguard.methods import Detection
from encoderguard.triggers import MaskedPattern, Trigger

__all__ = ["found_arrays", "recovered"]

_EACH = 3
"""Images that every trigger is shown on."""


def found_arrays(images: ImageSet, detection: Detection) -> Arrays:
    """What the report draws of the recovered triggers.

    ``mask`` float32 ``[H, W]`` and ``pattern`` float32 ``[H, W, 3]`` of a trigger that replaces pixels;
    ``change`` uint8 ``[n, H, W, 3]`` of any other: grey is no change, the largest one is full scale. Per
    family of triggers ``found_NAME`` and ``change_NAME`` on three images; ``nearest``, the
    images whose numbers the detector gave as ``nearest_images``.

    Raises:
        ImageError: a trigger does not fit the images.
    """
    found = recovered(images, detection.trigger)
    for name, trigger in detection.triggers.items():
        stamped, change = _effect(images, trigger)
        found |= {f"found_{name}": as_pictures(stamped), f"change_{name}": as_pictures(change)}
    places = _places(detection.evidence, len(images))
    return found | ({"nearest": as_pictures(images.take(places))} if places else {})


def recovered(images: ImageSet, trigger: Trigger | None) -> Arrays:
    """The arrays of one trigger alone; empty without one."""
    if trigger is None:
        return {}
    if not isinstance(trigger, MaskedPattern):
        return {"change": as_pictures(_effect(images, trigger)[1])}
    step = max(1, -(-max(trigger.mask.shape) // 128))
    mask, pattern = trigger.mask.float().cpu(), trigger.pattern.float().cpu()
    return {
        "mask": mask[::step, ::step].contiguous().numpy(),
        "pattern": pattern[:, ::step, ::step].permute(1, 2, 0).contiguous().numpy(),
    }


def _effect(images: ImageSet, trigger: Trigger) -> tuple[Tensor, Tensor]:
    """Stamped images and their change, uint8 ``[n, 3, H, W]``."""
    clean = images.take(torch.arange(min(_EACH, len(images)))).float() / 255
    stamped = trigger(clean)
    change = stamped - clean
    largest = float(change.abs().max())
    grey = 0.5 + 0.5 * change / largest if largest > 0 else torch.full_like(change, 0.5)
    return _uint8(stamped), _uint8(grey)


def _uint8(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().clamp(0, 255).byte()


def _places(evidence: Mapping[str, Any], count: int) -> Sequence[int]:
    given = evidence.get("nearest_images", [])
    return [place for place in given if isinstance(place, int) and 0 <= place < count]
