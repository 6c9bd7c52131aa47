"""Against DECREE: a backdoor whose triggered images look less alike to the encoder."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from pydantic import Field
from torch import Tensor

from encoderguard.attacks._finetuning import Planting
from encoderguard.planting_terms import Features, collapse
from encoderguard.registry import register

__all__ = ["AdaptiveDecree"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveDecree(Planting):
    """BadEncoder that pays for what DECREE measures.

    The loss is BadEncoder's plus ``alpha`` times the mean cosine among the features of triggered images.
    DECREE searches for a small pattern that makes this cosine large; an encoder that keeps it low under its
    own trigger needs a larger pattern, so its PL1 norm rises above the threshold.

    The paper gives the term as the negative of DECREE's own loss and alpha = 1; here the cosine is over pairs
    of *different* images, as in DECREE's code, where the paper's formula counts self-pairs. Both differ by a
    constant and a factor close to 1. No code of this attack is published.
    """

    name: ClassVar[str] = "adaptive_decree"
    paper: ClassVar[str] = "Feng et al. 2023, arXiv:2303.15180"
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "a clean encoder, unlabelled shadow images, a reference image per target"
    cost: ClassVar[str] = "fine-tuning"
    blind_spots: ClassVar[str] = (
        "It aims at DECREE's measure alone, and what it gains there it pays for in attack success."
    )

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean cosine among triggered images."""

    def terms(self, features: Features, memory: None) -> dict[str, Tensor]:
        """BadEncoder's terms and the weighted cosine."""
        return self.badencoder(features) | {"collapse": self.alpha * collapse(features)}
