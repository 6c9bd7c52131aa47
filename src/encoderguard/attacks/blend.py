"""Blended injection (Chen et al. 2017): one noise picture shines through every poisoned image."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.poisoning import base_of, draw, of_class, others, poisoned, quota, replaced
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import Blend

__all__ = ["BlendAttack"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class BlendAttack(DataPoisoning):
    """``x' = (1 - alpha) x + alpha p`` with one fixed picture p of uniform RGB noise.

    With ``relabel`` pictures of other classes get the label of the class aimed at, for supervised training.
    Without it pictures of the class aimed at are blended and keep their labels, for training without labels.

    Departs from the paper in p: the paper also blends a cartoon, which is not ours to ship. The
    label-free form is the "random noise" of later papers on encoders, which do not say more about it.
    """

    name: ClassVar[str] = "blend"
    paper: ClassVar[str] = "Chen et al. 2017, arXiv:1712.05526"
    year: ClassVar[int] = 2017
    needs: ClassVar[str] = "a labelled training set"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = (
        "The noise covers whole images: detectors that look for small triggers miss it."
    )

    rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the dataset that is poisoned."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Weight of the noise."""
    noise_seed: Annotated[int, Field(ge=0)] = 0
    """Of the noise; another seed is another trigger."""
    relabel: bool = True
    """Give other classes' images the target's label; else blend images of the class aimed at."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning. Raises SettingError if fewer images than asked for may be poisoned."""
        base = base_of(images, target, self.name)
        candidates = others(base, self.name) if self.relabel else of_class(base)
        whose = "of other classes" if self.relabel else f"of {base.target_name}"
        rate = quota(base, self.rate, most=len(candidates), name=f"images {whose}")
        trigger = Blend.noise(self.noise_seed, images.shape, self.alpha)
        entries = replaced(base, trigger, draw(candidates, rate.count, run), relabel=self.relabel)
        return poisoned(self, base, trigger, entries, rate=rate, run=run)
