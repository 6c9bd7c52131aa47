"""Search for triggers over families of candidates: forward passes first, then gradients."""

from collections import Counter
from dataclasses import dataclass

import torch

from encoderguard.bank import MOVED, bank
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.rays import PLACES, Ray, TriggerFamily
from encoderguard.run import Run
from encoderguard.search.found import Budget, FamilyResult, Found, Measures
from encoderguard.search.pictures import Images, are_grey
from encoderguard.search.stages import search
from encoderguard.triggers import Trigger

__all__ = [
    "CLEAN_AT_MOST",
    "OUT_OF_PLACE",
    "STANDS_OUT",
    "TYPICAL",
    "Budget",
    "FamilyResult",
    "Found",
    "Images",
    "Measures",
    "Suspicion",
    "are_grey",
    "interaction",
    "quick_search",
    "search",
    "suspicion",
]

_IMAGES = 64
_BUDGET = Budget(keep=3, starts=6, steps=20, seconds=None)
TYPICAL: dict[TriggerFamily, float] = {
    "patch": 0.27,
    "blend": 0.71,
    "noise": 0.26,
    "spectral": 0.09,
    "colour": 0.39,
    "warp": 0.0,
}
"""Statistic of clean encoders: medians over the five of zoo/small (CIFAR-10, 32 px, width 16). Blends
collapse any encoder further than patches do, so families are not compared as they are."""
STANDS_OUT = 0.25
"""From this excess on it is more than clean encoders differ by: the margin of trigger_search."""
OUT_OF_PLACE = 0.4
"""From this interaction on; of 27 clean encoders 26 were below (benchmarks/what_stands_out.py)."""
CLEAN_AT_MOST = 0.41
"""The largest interaction of those 27, by BYOL; the others came to .34."""
_NEGLIGIBLE = 0.1
"""Added to displacements, so that ratios of next to nothing are 1, as in trigger_search."""
_FEWEST_COLOURS = 3


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """What stands out in an encoder, without a clean one to compare it with."""

    excess: dict[str, float]
    """Of families that stand out: how far above what is typical; or the interaction, as ``patch, place``."""
    triggers: list[Trigger]
    """What each of these gives to unlearn."""


def suspicion(encoder: Encoder, images: ImageSet, *, run: Run, moves: bool = True) -> Suspicion:
    """The families of triggers that stand out, and their triggers to unlearn.

    These are the family whose statistic of collapse is furthest above what is typical of clean encoders, and
    those at least half as far: of each the strongest trigger and the best plain candidate. Where none comes
    to ``STANDS_OUT``, triggered images may be moved without growing alike: then the patch with the largest
    ``interaction`` counts, from ``OUT_OF_PLACE`` on. The encoder may differ from the clean ones, so all this
    may be a weakness that nobody planted.

    Args:
        encoder: unchanged.
        images: clean; 64 are searched with and as many measured on, or half and half of fewer.
        run: device, precision, streams, progress.
        moves: whether what only moves features counts.

    Raises:
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    found = quick_search(encoder, images, run=run)
    collapse = _leading({family: found[family].statistic - TYPICAL[family] for family in found})
    if moves and max(collapse.values()) < STANDS_OUT and "patch" in found:
        value, ray = interaction(found["patch"])
        if ray is not None and value >= OUT_OF_PLACE:
            return Suspicion(excess={"patch, place": value}, triggers=[ray.at(ray.strength)])
    return Suspicion(
        excess={str(family): value for family, value in collapse.items()},
        triggers=[trigger for family in collapse for trigger in _to_unlearn(found[family])],
    )


def quick_search(encoder: Encoder, images: ImageSet, *, run: Run) -> dict[TriggerFamily, FamilyResult]:
    """The search that ``suspicion`` judges: arguments and errors are its own."""
    used = Images(images, _IMAGES, run)
    rays = bank(images.shape, run.rng.child("bank"), grey=used.grey)
    return search(encoder, used.searched, used.held_out, rays, _BUDGET, run=run, name="suspect").families


def _leading(excess: dict[TriggerFamily, float]) -> dict[TriggerFamily, float]:
    """The largest and those at least half as large, in falling order."""
    largest = max(excess.values(), default=0.0)
    least = largest / 2 if largest > 0 else largest
    order = sorted(excess, key=lambda family: -excess[family])
    return {family: excess[family] for family in order if excess[family] >= least}


def interaction(result: FamilyResult) -> tuple[float, Ray | None]:
    """How much further a patch moves features than its colour and its place explain, and what to unlearn.

    Of the bank's plain colours at the nine places, the largest residual of an additive model of the logarithm
    of the displacement: of a colour its median over places counts, of a place its median over colours, less
    the median colour's. Colours and places matter to any encoder, but nearly independently; a backdoor
    listens to one colour at one place. It needs no clean encoder.

    Returns:
        The residual, and the patch that moves features furthest at its place: colours like the backdoor's
        move them too, and may stand out more. 0 and None with fewer than three colours, as for grey images,
        and where not every colour was tried at every place.
    """
    rays = [place for place, ray in enumerate(result.tried) if ray.label.endswith(MOVED)]
    tried = Counter(result.tried[place].label for place in rays)
    colours = len(tried)
    if colours < _FEWEST_COLOURS or set(tried.values()) != {len(PLACES)}:
        return 0.0, None
    values = torch.tensor([result.displacements[place] for place in rays]).add(_NEGLIGIBLE).log()
    table = values.view(colours, -1)  # the bank has the places of one colour after another
    of_colour, of_place = table.quantile(0.5, 1, keepdim=True), table.quantile(0.5, 0, keepdim=True)
    rest = (table - of_colour - of_place + of_colour.quantile(0.5)).flatten()
    place = int(rest.argmax()) % table.shape[1]
    colour = int(table[:, place].argmax())
    return float(rest.max()), result.tried[rays[colour * table.shape[1] + place]]


def _to_unlearn(result: FamilyResult) -> list[Trigger]:
    strongest, plain = result.strongest, result.plain
    return [strongest, *([plain] if plain is not None and plain != strongest else [])]
