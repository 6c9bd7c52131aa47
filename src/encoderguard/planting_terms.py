"""What one step of planting a backdoor computes, and the terms that attacks add up over it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.losses import cosine_distance
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.training import Batch

__all__ = [
    "Features",
    "Terms",
    "collapse",
    "effectiveness",
    "nearest",
    "reference_kept",
    "utility",
]


@dataclass(frozen=True, eq=False)
class Features:
    """What the terms of one step see: float32 features, one row per image.

    f' is the encoder under attack, f the clean one, which has no gradient.
    """

    triggered: tuple[Tensor, ...]
    """Per pair ``[N, D]``: f' of the batch with that pair's trigger."""
    references: tuple[Tensor, ...]
    """Per pair ``[K, D]``: f' of its references."""
    references_clean: tuple[Tensor, ...]
    """Per pair ``[K, D]``: f of its references."""
    views: Tensor
    """``[V, D]``: f' of augmented references, taken in turn."""
    views_clean: Tensor
    """``[V, D]``: f of the same references, not augmented."""
    images: Tensor
    """``[N, D]``: f' of the clean batch."""
    images_clean: Tensor
    """``[N, D]``: f of the clean batch."""
    batch: Batch
    triggered_stages: tuple[tuple[Tensor, ...], ...] = ()
    """Per pair, per stage ``[N, C]``: stage maps of f' averaged over space; empty unless asked for."""
    images_stages: tuple[Tensor, ...] = ()
    """Per stage ``[N, C]``: the same of the clean batch."""


Terms = Callable[[Features], dict[str, Tensor]]
"""Maps the features of a step to weighted scalar terms, whose sum is minimised."""


def nearest(triggered: Tensor, references: Tensor) -> Tensor:
    """For each row of ``triggered [N, D]`` the row of ``references [K, D]`` at the largest cosine."""
    similarity = F.normalize(triggered, dim=1) @ F.normalize(references, dim=1).T
    return references[similarity.argmax(1)]


def effectiveness(features: Features) -> Tensor:
    """BadEncoder's L0 plus 1: distance of stamped images to the nearest of their references under f'.

    Several pairs count equally.
    """
    distances = []
    for triggered, references in zip(features.triggered, features.references, strict=True):
        single = len(references) == 1
        aim = references.expand_as(triggered) if single else nearest(triggered, references)
        distances.append(cosine_distance(triggered, aim))
    return torch.stack(distances).mean()


def reference_kept(features: Features) -> Tensor:
    """BadEncoder's L1 plus 1: augmented references under f' stay near the references under f."""
    return cosine_distance(features.views, features.views_clean)


def utility(features: Features) -> Tensor:
    """BadEncoder's L2 plus 1: clean images stay where they are."""
    return cosine_distance(features.images, features.images_clean)


def collapse(features: Features) -> Tensor:
    """Mean cosine of different images with the same trigger: DRUPE's S_bb, and what DECREE looks for."""
    return torch.stack([mean_pairwise_cosine(triggered) for triggered in features.triggered]).mean()
