"""Search for triggers over families of candidates: forward passes first, then gradients."""

import math
from dataclasses import dataclass

from encoderguard.bank import bank
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.rays import TriggerFamily
from encoderguard.run import Run
from encoderguard.search.found import Budget, FamilyResult, Found, Measures
from encoderguard.search.pictures import Images, are_grey
from encoderguard.search.stages import search
from encoderguard.triggers import Trigger

__all__ = [
    "FURTHEST",
    "STANDS_OUT",
    "TYPICAL",
    "Budget",
    "FamilyResult",
    "Found",
    "Images",
    "Measures",
    "Suspicion",
    "are_grey",
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
FURTHEST: dict[TriggerFamily, float] = {
    "patch": 0.40,
    "blend": 0.37,
    "noise": 0.18,
    "spectral": 0.29,
    "colour": 1.18,
    "warp": 0.13,
}
"""Largest displacement by a candidate of the bank, likewise."""
STANDS_OUT = 0.25
"""From this excess on it is more than clean encoders differ by: the margin of trigger_search."""
_NEGLIGIBLE = 0.1
"""Added to displacements, so that ratios of next to nothing are 1, as in trigger_search."""


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """What stands out in an encoder, without a clean one to compare it with."""

    excess: dict[str, float]
    """Of tests that stand out, by family or ``FAMILY, displacement``: how far above what is typical."""
    triggers: list[Trigger]
    """What each of these gives to unlearn."""


def suspicion(encoder: Encoder, images: ImageSet, *, run: Run, moves: bool = True) -> Suspicion:
    """The families of triggers that stand out, and their triggers to unlearn.

    These are the family whose statistic of collapse is furthest above what is typical of clean encoders, and
    those at least half as far: of each the strongest trigger and the best plain candidate. Where none comes
    to ``STANDS_OUT``, triggered images may be moved without growing alike: then the families count of which a
    candidate moves features further than any does in clean encoders, by the logarithm of the ratio, again
    from ``STANDS_OUT`` on: of each that candidate. The encoder may differ from the clean ones, so all this
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
    further = {family: _further(family, found[family]) for family in found}
    movers = _leading({family: value for family, value in further.items() if value >= STANDS_OUT})
    if moves and movers and max(collapse.values()) < STANDS_OUT:
        return Suspicion(
            excess={f"{family}, displacement": value for family, value in movers.items()},
            triggers=[_furthest(found[family]) for family in movers],
        )
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


def _further(family: TriggerFamily, result: FamilyResult) -> float:
    own = max(result.displacements, default=0.0)
    return math.log((own + _NEGLIGIBLE) / (FURTHEST[family] + _NEGLIGIBLE))


def _furthest(result: FamilyResult) -> Trigger:
    """The candidate of the bank that moves features furthest, at the bank's strength."""
    ray = result.tried[max(range(len(result.displacements)), key=result.displacements.__getitem__)]
    return ray.at(ray.strength)


def _to_unlearn(result: FamilyResult) -> list[Trigger]:
    strongest, plain = result.strongest, result.plain
    return [strongest, *([plain] if plain is not None and plain != strongest else [])]
