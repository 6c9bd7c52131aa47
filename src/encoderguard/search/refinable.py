"""From rays to what a gradient search optimises, and back."""

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.parametrisations import BoundedAdditive, FreePattern, Parametrisation
from encoderguard.rays import (
    LEVELS,
    PLACES,
    Ray,
    TriggerFamily,
    additive_ray,
    blend_ray,
    patch_mask,
    patch_ray,
)
from encoderguard.triggers import Trigger

__all__ = ["REFINED", "elsewhere", "parametrisation", "random_ray", "ray_of"]

REFINED: dict[TriggerFamily, int] = {"patch": 3, "blend": 3, "noise": 2}
"""Families with a gradient search, and the level at which it starts."""


def elsewhere(patch: Ray, shape: tuple[int, int]) -> list[Ray]:
    """A patch at nine places, as large as patches get."""
    texture = patch.texture
    if texture is None:
        return []
    strength = LEVELS["patch"][-1]
    return [
        patch_ray(shape, texture, place, label=f"{patch.label}, moved", strength=strength) for place in PLACES
    ]


def random_ray(
    family: TriggerFamily, shape: tuple[int, int], channels: int, generator: torch.Generator
) -> Ray:
    """A start of the refinement that no candidate of the bank is near."""
    if family == "patch":
        down, right = torch.rand(2, generator=generator).tolist()
        texture = torch.rand(channels, 8, 8, generator=generator)
        return patch_ray(
            shape, texture, (down, right), label="random", strength=LEVELS[family][REFINED[family]]
        )
    noise = torch.rand(channels, *shape, generator=generator)
    if family == "blend":
        return blend_ray(noise, label="random", strength=LEVELS[family][REFINED[family]])
    return additive_ray(family, noise - 0.5, label="random", strength=LEVELS[family][REFINED[family]])


def parametrisation(
    family: TriggerFamily, shape: tuple[int, int], rays: list[Ray], level: float
) -> Parametrisation[Trigger]:
    """What a refinement changes of ``rays``: the colours of patches, whole pictures, or additions."""
    textures = [ray.texture for ray in rays if ray.texture is not None]
    if family == "noise":
        return BoundedAdditive(torch.full((len(rays),), level), torch.stack(textures))
    if family == "blend":
        return FreePattern(torch.full((len(rays), *shape), level), torch.stack(textures))
    masks, patterns = [], []
    for ray, texture in zip(rays, textures, strict=True):
        mask, rows, columns = patch_mask(shape, level, ray.place)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        pattern = torch.full((len(texture), *shape), 0.5)
        pattern[:, rows, columns] = F.interpolate(texture[None], size, mode="nearest-exact")[0]
        masks.append(mask)
        patterns.append(pattern)
    return FreePattern(torch.stack(masks), torch.stack(patterns))


def ray_of(family: TriggerFamily, shape: tuple[int, int], origin: Ray, trigger: Trigger, level: float) -> Ray:
    """The refined trigger with its strength free again."""
    channels = 3 if origin.texture is None else len(origin.texture)
    pattern: Tensor = trigger.pattern[:channels]  # type: ignore[attr-defined]
    label = f"refined from {origin.label.removeprefix('refined from ')}"
    if family == "noise":
        return additive_ray(family, pattern / level, label=label, strength=level)
    if family == "blend":
        return blend_ray(pattern, label=label, strength=level)
    _, rows, columns = patch_mask(shape, level, origin.place)
    return patch_ray(shape, pattern[:, rows, columns], origin.place, label=label, strength=level)
