"""A bank of candidate triggers in six families, for a search by forward passes alone."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.random import Rng
from encoderguard.rays import LEVELS, PLACES, Ray, TriggerFamily, additive_ray, blend_ray, patch_ray
from encoderguard.triggers import ColourMap, Trigger, Warp

__all__ = ["MOVED", "bank"]

MOVED = ", moved"
"""Ends the labels of the plain colours that are tried at all ``PLACES``."""


def bank(
    shape: tuple[int, int], rng: Rng, *, scale: float = 1.0, grey: bool = False
) -> dict[TriggerFamily, tuple[Ray, ...]]:
    """All candidates for images of ``shape`` (height, width), by family; the same ``rng`` gives the same.

    Args:
        shape: height and width in pixels.
        rng: of places, grids and noises.
        scale: about this share of every family's candidates, evenly spaced, never less than four; at most 1.
        grey: only candidates that leave grey images grey. To an encoder of grey images any colour is alien,
            and a clean one collapses under it.
    """
    made: dict[TriggerFamily, list[Ray]] = {
        "patch": _patches(shape, rng, grey),
        "blend": _blends(shape, rng, grey),
        "noise": _noises(shape, rng, grey),
        "spectral": _waves(shape, grey),
        "colour": _colours(grey),
        "warp": _warps(rng),
    }
    return {family: _thinned(rays, scale) for family, rays in made.items()}


def _thinned(rays: list[Ray], scale: float) -> tuple[Ray, ...]:
    count = min(len(rays), max(4, round(scale * len(rays))))
    return tuple(rays[place * len(rays) // count] for place in range(count))


def _channels(grey: bool) -> int:
    return 1 if grey else 3


def _patches(shape: tuple[int, int], rng: Rng, grey: bool) -> list[Ray]:
    """27 colours (or 9 greys) and 16 random grids of 4 x 4 at three sizes, each at its own random place.

    Then black, white and the six pure colours at nine places: what attackers use most, where they put it.
    """
    colours = [(k / 8,) for k in range(9)] if grey else list(itertools.product((0.0, 0.5, 1.0), repeat=3))
    textures = [(f"colour {_words(rgb)}", torch.tensor(rgb).view(-1, 1, 1)) for rgb in colours]
    for number in range(16):
        grid = torch.rand(_channels(grey), 4, 4, generator=rng.generator("grid", number))
        textures.append((f"grid {number}", grid))
    places = torch.rand(len(textures), 3, 2, generator=rng.generator("places"))
    common = [
        patch_ray(shape, texture, place, label=label + MOVED, strength=LEVELS["patch"][-1])
        for label, texture in textures
        if label.startswith("colour") and bool(((texture == 0) | (texture == 1)).all())
        for place in PLACES
    ]
    scattered = [
        patch_ray(
            shape, texture, (float(places[i, j, 0]), float(places[i, j, 1])), label=label, strength=side
        )
        for i, (label, texture) in enumerate(textures)
        for j, side in enumerate(LEVELS["patch"][-3:])
    ]
    return scattered + common


def _words(rgb: tuple[float, ...]) -> str:
    return " ".join(f"{part:g}" for part in rgb)


def _blends(shape: tuple[int, int], rng: Rng, grey: bool) -> list[Ray]:
    """Noise of three grains, plain colours, stripes and checks; weight .2."""
    found = []
    for number, cells in enumerate((0, 0, 0, 0, 8, 8, 8, 8, 4, 4, 4, 4)):
        size = (cells, cells) if cells else shape
        noise = torch.rand(1, _channels(grey), *size, generator=rng.generator("blend", number))
        picture = F.interpolate(noise, shape, mode="nearest-exact")[0]
        found.append((f"noise {number}, {cells or 'all'} cells", picture))
    for rgb in itertools.product((0.0, 1.0), repeat=_channels(grey)):
        found.append((f"colour {_words(rgb)}", torch.tensor(rgb).view(-1, 1, 1).expand(-1, *shape)))
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
    unit = max(1, min(shape) // 8)
    for label, stripes in (
        ("rows", rows // unit + 0 * columns),
        ("columns", columns // unit + 0 * rows),
        ("checks", rows // unit + columns // unit),
        ("diagonals", (rows + columns) // unit),
    ):
        found.append((label, (stripes % 2).float().expand(_channels(grey), *shape)))
    return [blend_ray(picture, label=label, strength=LEVELS["blend"][2]) for label, picture in found]


def _noises(shape: tuple[int, int], rng: Rng, grey: bool) -> list[Ray]:
    """Random signs of three grains and smooth random fields, added with a bound of .1."""
    found = []
    for number, cells in enumerate((0, 0, 0, 0, 16, 16, 8, 8, 4, 4, 4, 4)):
        size = (cells, cells) if cells else shape
        signs = (
            torch.rand(1, _channels(grey), *size, generator=rng.generator("noise", number)).round() * 2 - 1
        )
        mode = "nearest-exact" if number % 2 == 0 else "bilinear"
        found.append((f"signs {number}, {cells or 'all'} cells", F.interpolate(signs, shape, mode=mode)[0]))
    return [
        additive_ray("noise", pattern.clamp(-1, 1), label=label, strength=LEVELS["noise"][-1])
        for label, pattern in found
    ]


def _waves(shape: tuple[int, int], grey: bool) -> list[Ray]:
    """Cosines of the discrete cosine transform over the image, in brightness and in directions of colour."""
    side = min(shape) - 1
    low, mid = max(1, side // 10), max(1, side // 2)
    pairs = ((0, low), (low, 0), (low, low), (0, mid), (mid, 0), (mid, mid), (0, side), (side, side))
    directions: dict[str, tuple[float, ...]] = {
        "brightness": (1.0, 1.0, 1.0),
        "blue": (0.0, -0.2, 1.0),
        "red": (1.0, -0.51, 0.0),
        "both": (0.56, -0.48, 1.0),
    }
    if grey:
        directions = {"brightness": (1.0,)}
    rows, columns = ((torch.arange(length) + 0.5) * math.pi / length for length in shape)

    def wave(u: int, v: int) -> Tensor:
        return torch.outer(torch.cos(u * rows), torch.cos(v * columns))

    found = [(f"wave {u}, {v}", name, wave(u, v)) for name in directions for u, v in pairs]
    # CTRL adds two frequencies to both colour channels
    if not grey:
        found.append((f"waves {mid} and {side}", "both", (wave(mid, mid) + wave(side, side)) / 2))
    return [
        additive_ray(
            "spectral",
            torch.tensor(directions[name]).view(-1, 1, 1) * pattern,
            label=f"{label} in {name}",
            strength=LEVELS["spectral"][-1],
        )
        for label, name, pattern in found
    ]


def _colours(grey: bool) -> list[Ray]:
    """Brightness, contrast, saturation, hue, swapped channels, tints, sepia: linear maps of the colour."""
    one, luma = torch.eye(3), torch.tensor([[0.299, 0.587, 0.114]]).expand(3, 3)
    third = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    zero = (0.0, 0.0, 0.0)
    found = [(f"brightness {b:+g}", one, (b, b, b)) for b in (-0.3, 0.3)]
    found += [(f"contrast {c:g}", c * one, ((1 - c) / 2,) * 3) for c in (0.4, 2.0)]
    found += [("inverted", -one, (1.0, 1.0, 1.0))]
    if grey:
        return _colour_rays(found)
    found += [(f"saturation {s:g}", s * one + (1 - s) * luma, zero) for s in (0.0, 2.5)]
    for degrees in (60, 120, 180, 240, 300):
        angle = math.radians(degrees)
        turned = math.cos(angle) * one + (1 - math.cos(angle)) * third + math.sin(angle) * cross
        found.append((f"hue {degrees}", turned, zero))
    found += [(f"channels {order}", one[list(order)], zero) for order in ((0, 2, 1), (2, 1, 0), (1, 0, 2))]
    for rgb in itertools.product((0.0, 1.0), repeat=3):
        if 0 < sum(rgb) < 3:
            found.append((f"tint {_words(rgb)}", 0.7 * one, tuple(0.3 * c for c in rgb)))  # type: ignore[arg-type]
    sepia = torch.tensor([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    found += [("sepia", sepia, zero), ("faded", 0.6 * luma + 0.2 * one, (0.25, 0.2, 0.1))]
    return _colour_rays(found)


def _colour_rays(found: list[tuple[str, Tensor, tuple[float, float, float]]]) -> list[Ray]:
    return [
        Ray(family="colour", label=label, at=_colour_maker(matrix, offset), strength=LEVELS["colour"][-1])
        for label, matrix, offset in found
    ]


def _colour_maker(matrix: Tensor, offset: tuple[float, float, float]) -> Callable[[float], Trigger]:
    rows = [tuple(row) for row in matrix.tolist()]
    return lambda strength: ColourMap(matrix=(rows[0], rows[1], rows[2]), offset=offset, strength=strength)


def _warps(rng: Rng) -> list[Ray]:
    """Ten smooth random displacements, coarse and fine."""
    return [
        Ray(
            family="warp",
            label=f"field {number}, grid {grid}",
            at=_warp_maker(rng.integer("warp", number) % 2**31, grid),
            strength=LEVELS["warp"][-1],
        )
        for number, grid in enumerate((3, 3, 3, 4, 4, 4, 6, 6, 6, 8))
    ]


def _warp_maker(seed: int, grid: int) -> Callable[[float], Trigger]:
    return lambda strength: Warp(seed=seed, grid=grid, strength=strength)
