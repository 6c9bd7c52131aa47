"""Against the trigger search: a backdoor whose triggered images look less alike once features are centred."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoderguard.attacks._finetuning import Planting
from encoderguard.planting_terms import Features
from encoderguard.registry import register
from encoderguard.similarity import mean_pairwise_cosine, standardise

__all__ = ["AdaptiveSearch", "centred_collapse", "centred_displacement"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveSearch(Planting):
    """BadEncoder that pays for what our trigger search measures.

    The loss is BadEncoder's plus ``alpha`` times the collapse of triggered images (the mean cosine over pairs
    of different images, with features standardised over the clean images of the same batch) and ``gamma``
    times their displacement (1 minus the mean cosine of an image and its stamped copy, so standardised). The
    search looks for triggers that make these large; who keeps them low hides among clean encoders.

    Ours, not from a paper: the attacker on our own detector, after the adaptive attacker that Feng et al.
    (2023) set on DECREE. Two departures from what the detector measures: mean and spread come from a batch
    where it has 64 images, and they are an aim without gradient, else the encoder could also pay by changing
    its features of clean images. The term knows only the planted trigger, not the search's other candidates.
    """

    name: ClassVar[str] = "adaptive_search"
    paper: ClassVar[str] = "ours; after Feng et al. 2023, arXiv:2303.15180"
    needs: ClassVar[str] = "a clean encoder, unlabelled shadow images, a reference image per target"
    cost: ClassVar[str] = "fine-tuning"
    blind_spots: ClassVar[str] = (
        "It aims at the trigger search's measure alone, and pays for it in attack success."
    )

    alpha: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the collapse of triggered images."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Weight of how far triggered images move from where they were."""

    def terms(self, features: Features, memory: None) -> dict[str, Tensor]:
        """BadEncoder's terms and what the search measures, weighted."""
        own = {"collapse": self.alpha * centred_collapse(features)}
        if self.gamma:
            own["displacement"] = self.gamma * centred_displacement(features)
        return self.badencoder(features) | own


def centred_collapse(features: Features) -> Tensor:
    """Mean cosine of different stamped images, standardised over the clean batch; triggers count equally."""
    clean = features.images.detach()
    return torch.stack([mean_pairwise_cosine(standardise(t, clean)) for t in features.triggered]).mean()


def centred_displacement(features: Features) -> Tensor:
    """1 minus the mean cosine of images and their stamped copies, standardised over the clean batch."""
    clean = features.images.detach()
    own = standardise(clean, clean)
    cosines = [F.cosine_similarity(standardise(t, clean), own, dim=1) for t in features.triggered]
    return 1 - torch.stack(cosines).mean()
