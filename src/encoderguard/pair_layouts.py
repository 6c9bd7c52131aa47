"""The poisons that show two things side by side, so that two random crops often show one each.

One half is a picture of the class aimed at (the object), the other a random picture with the trigger.
A canvas is as large as both and is never resized: only then do crops cut the halves apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from encoderguard.errors import ImageError, SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.patch_places import drawn_places
from encoderguard.poisoning import Base, base_of, of_class, others, poisoned, quota
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch, stamp_uint8

__all__ = ["Orientation", "PairLayout", "joined", "poison_with_pairs"]

Orientation = Literal["left", "right", "top", "bottom"]
"""Where the object lies; the trigger is in the other half."""
_LYING = frozenset({"left", "right"})


@dataclass(frozen=True, kw_only=True)
class PairLayout:
    """What tells the three attacks apart."""

    rate: float
    """Canvases that are appended, as a share of the training set."""
    trigger: ColourPatch
    """Its ``span`` says where in its half the patch may lie."""
    orientations: Sequence[Orientation]
    """Drawn from for each canvas."""
    objects: int | None
    """Pictures of the class aimed at to use as objects; None takes all."""
    support_share: float = 0.0
    """Share of the canvases that show two pictures of the class aimed at and no trigger."""


def poison_with_pairs(
    method: DataPoisoning,
    layout: PairLayout,
    images: ImageSet,
    target: int,
    *,
    run: Run,
    references: ImageSet | None,
) -> Poisoned:
    """Append canvases to a copy of the training set.

    Raises:
        ImageError: no labels, no class aimed at, no other class, references of another size, too few objects,
            or a patch that does not fit into its half.
        SettingError: a rate that is no picture, or orientations that need canvases of two sizes.
    """
    _check(layout.orientations, method.name)
    base = base_of(images, target, method.name)
    rate = quota(base, layout.rate)
    pictures, where = _pictures(base, references, method.name)
    objects, supports = _roles(len(pictures), layout, run, method.name)
    backgrounds = others(base, method.name)
    places = drawn_places(
        rate.count, images.shape, layout.trigger.size, layout.trigger.span, run, method.name
    )
    paired = round(layout.support_share * rate.count)
    generator = run.rng.generator("pairs")
    canvases, entries = [], list[dict[str, Any]]()
    for number in range(rate.count):
        chosen = int(_one(objects, generator))
        orientation = layout.orientations[int(_one(torch.arange(len(layout.orientations)), generator))]
        entry: dict[str, Any] = {
            "index": len(images) + number,
            "source_index": int(where[chosen]),
            "label_before": None,
            "label_after": None,
            "orientation": orientation,
        }
        if number < paired:
            second = int(_one(supports, generator))
            other = pictures[second]
            entry |= {"kind": "support", "support": int(where[second])}
        else:
            ground, place = int(_one(backgrounds, generator)), places[number]
            other = _with_patch(base.pixels[ground], layout.trigger, place)
            entry |= {"kind": "trigger", "background": ground}
            entry["place"] = _on_canvas(place, orientation, images.shape)
        canvases.append(joined(pictures[chosen], other, orientation))
        entries.append(entry)
    return poisoned(
        method,
        base,
        layout.trigger.at_test(),
        entries,
        rate=rate,
        run=run,
        canvases=torch.stack(canvases),
        objects=[int(where[k]) for k in objects],
        references=None if references is None else {"name": references.name, "digest": references.digest},
    )


def joined(thing: Tensor, other: Tensor, orientation: Orientation) -> Tensor:
    """Two pictures ``[3, H, W]`` as one of twice the width (or height); ``thing`` lies at ``orientation``."""
    pair = [thing, other] if orientation in ("left", "top") else [other, thing]
    return torch.cat(pair, dim=2 if orientation in _LYING else 1)


def _on_canvas(place: tuple[int, int], orientation: Orientation, shape: tuple[int, int]) -> list[int]:
    """Row and column of a place in the half that is not the object's."""
    row, column = place
    return [
        row + (shape[0] if orientation == "top" else 0),
        column + (shape[1] if orientation == "left" else 0),
    ]


def _with_patch(picture: Tensor, trigger: ColourPatch, place: tuple[int, int]) -> Tensor:
    return stamp_uint8(replace(trigger, place=place), picture[None])[0]


def _one(candidates: Tensor, generator: torch.Generator) -> Tensor:
    return candidates[torch.randint(len(candidates), (), generator=generator)]


def _pictures(base: Base, references: ImageSet | None, attack: str) -> tuple[Tensor, Tensor]:
    """Pictures of the class aimed at, and their places in the set that they come from."""
    if references is None:
        where = of_class(base)
        return base.pixels[where], where
    if references.shape != base.source.shape:
        raise ImageError(
            f"{attack} pastes reference pictures beside training pictures: expected both of one size, found "
            f"{list(references.shape)} and {list(base.source.shape)}; bring them to one with --image-size."
        )
    where = torch.arange(len(references))
    return references.take(where), where


def _roles(count: int, layout: PairLayout, run: Run, attack: str) -> tuple[Tensor, Tensor]:
    """Which pictures are objects, and which stand beside them without a trigger."""
    wanted = count if layout.objects is None else layout.objects
    if wanted > count:
        raise ImageError(
            f"{attack} needs {wanted} pictures of the class aimed at to paste, found {count}; "
            "give more references or ask for fewer."
        )
    order = run.rng.permutation(count, "objects")
    objects, supports = order[:wanted].sort().values, order[wanted:].sort().values
    if layout.support_share and not len(supports):
        raise ImageError(
            f"{attack} needs further pictures of the class aimed at for its support pairs, but all {count} "
            "are objects; give more references, ask for fewer objects, or set support_share=0."
        )
    return objects, supports


def _check(orientations: Sequence[Orientation], attack: str) -> None:
    lying = set(orientations) & _LYING
    if not orientations or (lying and set(orientations) - _LYING):
        raise SettingError(
            f"Setting 'orientations' of attack '{attack}' cannot be {list(orientations)}: canvases are "
            "all of one size; give left and right, or top and bottom."
        )
