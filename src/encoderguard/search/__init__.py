"""Search for triggers over families of candidates: forward passes first, then gradients."""

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
    "are_grey",
    "search",
    "triggers_of",
]

_IMAGES = 64
_BUDGET = Budget(keep=3, starts=6, steps=20, seconds=None)


def triggers_of(encoder: Encoder, images: ImageSet, *, run: Run) -> tuple[TriggerFamily, list[Trigger]]:
    """The family under whose triggers features collapse most, and its triggers to unlearn.

    No clean encoder is asked whether it collapses as well, so this may be a weakness that nobody planted.

    Args:
        encoder: unchanged.
        images: clean; 64 are searched with and as many measured on, or half and half of fewer.
        run: device, precision, streams, progress.

    Returns:
        The family, and its strongest trigger with its best plain candidate, if they differ.

    Raises:
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    used = Images(images, _IMAGES, run)
    rays = bank(images.shape, run.rng.child("bank"), grey=used.grey)
    found = search(encoder, used.searched, used.held_out, rays, _BUDGET, run=run, name="suspect")
    family = max(found.families, key=lambda name: found.families[name].statistic)
    strongest, plain = found.families[family].strongest, found.families[family].plain
    return family, [strongest, *([plain] if plain is not None and plain != strongest else [])]
