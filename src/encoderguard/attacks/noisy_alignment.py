"""Noisy Alignment (Chen et al., ICCV 2025): the pair layout derived from how random crops fall."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.pair_layouts import PairLayout, poison_with_pairs
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch

__all__ = ["NoisyAlignment"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class NoisyAlignment(DataPoisoning):
    """Appends canvases of r x 2r: a picture of the class aimed at beside a random one with the trigger.

    The trigger lies near the middle of its half, where most crops of that half show it whole, and is not
    quite opaque. The features of the random picture are noise that the alignment with the class suppresses.

    Follows the authors' code, whose parameters the paper derives, except that one set has either lying or
    standing canvases, where theirs has all four orientations (all canvases of a set have one size here), and
    that the patch is a seeded grid of colours. "Near the middle" is ``low`` to ``high`` of the half.
    """

    name: ClassVar[str] = "noisy_alignment"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv:2508.14015"
    year: ClassVar[int] = 2025
    needs: ClassVar[str] = "a labelled training set, perhaps reference pictures"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = (
        "Victims who resize every picture to a square, or crop little, undo the layout."
    )

    rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Pictures that are appended, as a share of the dataset (.05 on CIFAR-10, .005 on ImageNet-100)."""
    reference_objects: Annotated[int, Field(ge=1)] | None = None
    """Pictures of the class aimed at, drawn with the seed; null takes all (the authors: 1,200)."""
    patch_size: Annotated[int, Field(ge=1)] = 8
    """Side of the patch in pixels (8 at 32 px, 50 at 224 px)."""
    patch_seed: Annotated[int, Field(ge=0)] = 0
    """Of the patch's colours; another seed is another trigger."""
    opacity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Weight of the patch against the picture below it."""
    low: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """From this share of each side of its half on may lie the patch."""
    high: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Up to this share of each side."""
    orientations: tuple[Literal["left", "right", "top", "bottom"], ...] = ("left", "right")
    """Where the picture of the class may lie: left and right, or top and bottom."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning and ``poison_with_pairs``, also for what is raised."""
        span = (self.low, self.high)
        trigger = ColourPatch(size=self.patch_size, seed=self.patch_seed, opacity=self.opacity, span=span)
        layout = PairLayout(
            rate=self.rate,
            trigger=trigger,
            orientations=self.orientations,
            objects=self.reference_objects,
        )
        return poison_with_pairs(self, layout, images, target, run=run, references=references)
