"""Search for triggers over families of candidates: forward passes first, then gradients."""

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
    "Budget",
    "FamilyResult",
    "Found",
    "Images",
    "Measures",
    "Suspicion",
    "are_grey",
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


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """What stands out in an encoder, without a clean one to compare it with."""

    excess: dict[TriggerFamily, float]
    """Of families that stand out: how far the statistic is above what is typical, the largest first."""
    triggers: list[Trigger]
    """Of each of these the strongest trigger and the best plain candidate, if they differ."""


def suspicion(encoder: Encoder, images: ImageSet, *, run: Run) -> Suspicion:
    """The families of triggers that stand out, and their triggers to unlearn.

    These are the family whose statistic is furthest above what is typical of clean encoders, and those that
    are at least half as far. The encoder may differ from them, so this may be a weakness that nobody planted.

    Args:
        encoder: unchanged.
        images: clean; 64 are searched with and as many measured on, or half and half of fewer.
        run: device, precision, streams, progress.

    Raises:
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    used = Images(images, _IMAGES, run)
    rays = bank(images.shape, run.rng.child("bank"), grey=used.grey)
    found = search(encoder, used.searched, used.held_out, rays, _BUDGET, run=run, name="suspect")
    excess = {family: result.statistic - TYPICAL[family] for family, result in found.families.items()}
    largest = max(excess.values())
    least = largest / 2 if largest > 0 else largest
    chosen = sorted((f for f, value in excess.items() if value >= least), key=lambda f: -excess[f])
    return Suspicion(
        excess={family: excess[family] for family in chosen},
        triggers=[trigger for family in chosen for trigger in _to_unlearn(found.families[family])],
    )


def _to_unlearn(result: FamilyResult) -> list[Trigger]:
    strongest, plain = result.strongest, result.plain
    return [strongest, *([plain] if plain is not None and plain != strongest else [])]
