"""Triggers by name, with defaults that fit an image size: for the command line and for attacks."""

import ast
import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationError, validate_call

from encoderguard.errors import SettingError
from encoderguard.triggers.altering import ColourMap, Warp
from encoderguard.triggers.badnets import FourCorner, PixelGrid
from encoderguard.triggers.base import Count, Flag, Index, Share, Trigger, Weight, reason
from encoderguard.triggers.patches import ColourPatch, Patch
from encoderguard.triggers.whole_image import Additive, Blend, FreshNoise, SpectralDCT

__all__ = ["trigger_named", "trigger_names"]

_Shape = tuple[int, int]
_Row = tuple[float, float, float]
_SEPIA: tuple[_Row, _Row, _Row] = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))


def trigger_names() -> list[str]:
    """The names that ``trigger_named`` knows, sorted."""
    return sorted(_BUILDERS)


def trigger_named(name: str, image_size: int | _Shape, **settings: Any) -> Trigger:
    """A trigger by name for images of a size; what is not given fits the size as in the trigger's source.

    Names are the kinds of trigger; ``blend`` and ``additive`` draw their pattern from ``seed``. ``square``
    (3 px white, margin 1) and ``random_pixel`` (fresh grey noise) are the ones that NAD's code calls so.

    Args:
        name: see ``trigger_names``.
        image_size: side in pixels, or (height, width).
        settings: see docs/triggers.md; strings are parsed as on the command line.

    Raises:
        SettingError: an unknown name or setting (the message lists the known ones), or an impossible value.
    """
    if name not in _BUILDERS:
        raise SettingError(f"Unknown trigger '{name}'; expected one of: {', '.join(trigger_names())}.")
    builder, shape = _BUILDERS[name], (image_size, image_size) if isinstance(image_size, int) else image_size
    known = list(inspect.signature(builder).parameters)[1:]
    if unknown := sorted(set(settings) - set(known)):
        expected = f"expected one of: {', '.join(known)}" if known else "it has none"
        raise SettingError(f"Unknown setting '{unknown[0]}' of the trigger '{name}'; {expected}.")
    given = {key: _parsed(value) for key, value in settings.items()}
    try:
        return validate_call(builder)(shape, **given)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise SettingError(
            f"Setting '{key}' of the trigger '{name}' cannot be {given.get(str(key))!r}: {reason(error, 1)}."
        ) from None


def _parsed(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    return value


def _patch(
    shape: _Shape, size: Count | None = None, margin: Index | None = None, value: Share = 1.0
) -> Trigger:
    made = Patch.field(min(shape), size)
    return replace(made, margin=made.margin if margin is None else margin, value=value)


def _square(shape: _Shape, size: Count = 3, margin: Index = 1, value: Share = 1.0) -> Trigger:
    return Patch(size=size, margin=margin, value=value)


def _colour_patch(
    shape: _Shape,
    size: Count | None = None,
    seed: Index = 0,
    grid: Count = 4,
    smooth: Flag = True,
    opacity: Weight = 1.0,
    place: tuple[Index, Index] | None = None,
    span: tuple[Share, Share] = (0.25, 0.75),
    test_span: tuple[Share, Share] = (0.10, 0.90),
) -> Trigger:
    side = min(shape)
    return ColourPatch(
        size=size or (50 if side == 224 else max(1, side // 4)),
        seed=seed,
        grid=grid,
        smooth=smooth,
        opacity=opacity,
        place=place,
        span=span,
        test_span=test_span,
    )


def _blend(shape: _Shape, alpha: Weight = 0.2, seed: Index = 0) -> Trigger:
    return Blend.noise(seed, shape, alpha)


def _fresh_noise(shape: _Shape, alpha: Weight = 0.2, grey: Flag = False, seed: Index = 0) -> Trigger:
    return FreshNoise(alpha=alpha, grey=grey, seed=seed)


def _random_pixel(shape: _Shape, alpha: Weight = 0.2, seed: Index = 0) -> Trigger:
    return FreshNoise(alpha=alpha, grey=True, seed=seed)


def _spectral(
    shape: _Shape,
    magnitude: float = 50.0,
    coefficients: tuple[tuple[Index, Index], ...] | None = None,
    window: Count | None = None,
) -> Trigger:
    side = window or min(32, *shape)  # below 32 px one small window; at its middle and its last wave
    middle, last = side // 2 - 1, side - 1
    waves = ((middle, middle), (last, last)) if coefficients is None else coefficients
    return SpectralDCT(magnitude=magnitude, coefficients=waves, window=side)


def _additive(shape: _Shape, bound: Weight = 8 / 255, seed: Index = 0) -> Trigger:
    return Additive.noise(seed, shape, bound)


def _pixel_grid(shape: _Shape) -> Trigger:
    return PixelGrid()


def _four_corner(shape: _Shape) -> Trigger:
    return FourCorner()


def _colour_map(
    shape: _Shape,
    matrix: tuple[_Row, _Row, _Row] = _SEPIA,
    offset: _Row = (0.0, 0.0, 0.0),
    strength: Weight = 1.0,
) -> Trigger:
    return ColourMap(matrix=matrix, offset=offset, strength=strength)


def _warp(
    shape: _Shape, seed: Index = 0, grid: Annotated[int, Field(ge=2)] = 4, strength: Weight = 0.05
) -> Trigger:
    return Warp(seed=seed, grid=grid, strength=strength)


_BUILDERS: dict[str, Callable[..., Trigger]] = {
    "additive": _additive,
    "blend": _blend,
    "colour_map": _colour_map,
    "colour_patch": _colour_patch,
    "four_corner": _four_corner,
    "fresh_noise": _fresh_noise,
    "patch": _patch,
    "pixel_grid": _pixel_grid,
    "random_pixel": _random_pixel,
    "spectral": _spectral,
    "square": _square,
    "warp": _warp,
}
