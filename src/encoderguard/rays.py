"""Rays: candidate triggers whose strength can be set, so that one candidate is tried weaker and stronger.

Strengths are in the unit of the candidate's family; ``LEVELS`` are those at which families are compared.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.triggers import Additive, Blend, MaskedPattern, Trigger

__all__ = [
    "FAMILIES",
    "LEVELS",
    "PLACES",
    "UNITS",
    "Ray",
    "TriggerFamily",
    "additive_ray",
    "blend_ray",
    "patch_mask",
    "patch_ray",
]

TriggerFamily = Literal["patch", "blend", "noise", "spectral", "colour", "warp"]
FAMILIES: tuple[TriggerFamily, ...] = get_args(TriggerFamily)
LEVELS: dict[TriggerFamily, tuple[float, ...]] = {
    "patch": (0.0625, 0.125, 0.1875, 0.25, 0.3125),
    "blend": (0.025, 0.05, 0.1, 0.2, 0.3),
    "noise": (0.01, 0.02, 0.04, 0.07, 0.1),
    "spectral": (0.01, 0.02, 0.04, 0.07, 0.1),
    "colour": (0.1, 0.25, 0.5, 0.75, 1.0),
    "warp": (0.01, 0.02, 0.04, 0.06, 0.08),
}
"""Strengths, ascending. The largest still leave an image recognisable."""
_ALONG = (0.04, 0.5, 0.96)
PLACES: tuple[tuple[float, float], ...] = tuple(itertools.product(_ALONG, _ALONG))
"""Of patches: near both edges, with about a pixel between, and the middle."""
UNITS: dict[TriggerFamily, str] = {
    "patch": "side, share of the image's shorter side",
    "blend": "weight of the picture",
    "noise": "largest change of a pixel, of 0..1",
    "spectral": "largest change of a pixel, of 0..1",
    "colour": "share of the full change",
    "warp": "mean displacement, share of the image's side",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Ray:
    """One candidate of the bank."""

    family: TriggerFamily
    label: str
    at: Callable[[float], Trigger]
    """The trigger at a strength in the family's unit."""
    strength: float
    """At which the bank tries it."""
    texture: Tensor | None = None
    """What a gradient search may change, ``[3 or 1, h, w]``: colours in [0, 1], or fractions of the bound."""
    place: tuple[float, float] = (0.5, 0.5)
    """Of a patch: 0 is the upper or left edge, 1 the lower or right one."""


def patch_mask(
    shape: tuple[int, int], side: float, place: tuple[float, float]
) -> tuple[Tensor, slice, slice]:
    """A square mask ``[H, W]`` and its rows and columns; ``side`` is a share of the shorter side."""
    pixels = max(1, min(min(shape), round(side * min(shape))))
    top, left = (round(at * (length - pixels)) for at, length in zip(place, shape, strict=True))
    rows, columns = slice(top, top + pixels), slice(left, left + pixels)
    mask = torch.zeros(shape)
    mask[rows, columns] = 1
    return mask, rows, columns


def patch_ray(
    shape: tuple[int, int], texture: Tensor, place: tuple[float, float], *, label: str, strength: float
) -> Ray:
    """A square patch of any side with the texture ``[3 or 1, h, w]`` stretched over it."""

    def at(side: float) -> Trigger:
        mask, rows, columns = patch_mask(shape, side, place)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        pattern = torch.zeros(3, *shape)
        pattern[:, rows, columns] = F.interpolate(texture[None], size, mode="nearest-exact")[0]
        return MaskedPattern(mask, pattern)

    return Ray(family="patch", label=label, at=at, strength=strength, texture=texture, place=place)


def blend_ray(picture: Tensor, *, label: str, strength: float) -> Ray:
    """A picture ``[3 or 1, H, W]`` that shines through with any weight."""
    return Ray(
        family="blend",
        label=label,
        at=lambda alpha: Blend(picture.expand(3, -1, -1), alpha),
        strength=strength,
        texture=picture,
    )


def additive_ray(family: TriggerFamily, pattern: Tensor, *, label: str, strength: float) -> Ray:
    """A pattern ``[3 or 1, H, W]`` in [-1, 1] times any bound, added."""
    return Ray(
        family=family,
        label=label,
        at=lambda bound: Additive(bound * pattern.expand(3, -1, -1)),
        strength=strength,
        texture=pattern,
    )
