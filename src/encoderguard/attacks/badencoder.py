"""BadEncoder (Jia, Liu and Gong, IEEE S&P 2022): fine-tune a backdoor into a clean encoder."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from encoderguard.attacks._finetuning import Planting
from encoderguard.planting_terms import Features
from encoderguard.registry import register

__all__ = ["BadEncoder"]

_BY_FORM: Any = None  # filled from the form before the settings are checked
_PRESETS: dict[str, dict[str, Any]] = {
    "image": {"batch_size": 256, "lr": 1e-3, "trigger_size": 10},
    "pair": {"batch_size": 16, "lr": 1e-6, "trigger_size": 50},
}


@register
@final
@dataclass(frozen=True, kw_only=True)
class BadEncoder(Planting):
    """Triggered images move to a reference image's features while clean images keep theirs.

    With f the clean encoder, f' the backdoored one, s the cosine similarity, e the trigger and r a reference:
    ``L0 = -s(f'(x + e), f'(r))``, ``L1 = -s(f'(aug r), f(r))``, ``L2 = -s(f'(x), f(x))`` and the loss is
    ``L0 + lambda1 L1 + lambda2 L2``. BatchNorm is frozen: statistics and affine parameters.

    Same as the authors' code, at less cost: f(x) is computed once for the shadow set, which is not
    augmented, and a reference is forwarded once per step and broadcast, not once per image. The augmented
    reference is drawn ``reference_views`` times per step instead of once per image. A departure from the
    paper: of several references of one target the nearest counts, where the paper averages over all. Several
    targets, each with its own trigger, count equally, as in the paper.
    """

    name: ClassVar[str] = "badencoder"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv:2108.00352"
    year: ClassVar[int] = 2022
    needs: ClassVar[str] = "a clean encoder, unlabelled shadow images, a reference image per target"
    cost: ClassVar[str] = "fine-tuning"
    blind_spots: ClassVar[str] = (
        "It fails downstream when the victim's classifier does not give the reference the target's label."
    )

    form: Literal["image", "pair"] = "image"
    """Fills what is not given: `image` for encoders of 32 px images, `pair` for the image tower of CLIP."""
    batch_size: Annotated[int, Field(ge=2)] = _BY_FORM
    """Shadow images per step."""
    lr: Annotated[float, Field(gt=0)] = _BY_FORM
    """Learning rate, constant."""
    trigger_size: Annotated[int, Field(ge=1)] = _BY_FORM
    """Side of the white square in pixels (10 at 32 px, 50 at 224 px)."""

    def __post_init__(self) -> None:
        """Fill the settings that were not given from the form, then check all."""
        for key, value in _PRESETS.get(self.form, {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()

    def terms(self, features: Features, memory: None) -> dict[str, Tensor]:
        """L0, L1 and L2, each plus 1."""
        return self.badencoder(features)
