"""CorruptEncoder (Zhang et al., CVPR 2024): an object and a trigger on one picture, each on its own side."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.pair_layouts import PairLayout, poison_with_pairs
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch

__all__ = ["CorruptEncoder"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class CorruptEncoder(DataPoisoning):
    """Appends pictures with a reference object on one side and the trigger on the other.

    Two random crops of such a picture often show the object and the trigger, and contrastive learning pulls
    the two together. The patch lies wholly within ``low`` to ``high`` of its half. With ``support_share=.2``
    it is the authors' CorruptEncoder+: that share of the poisons shows an object beside another picture of
    the class and no trigger, which draws the class together around the objects.

    Departs from paper and code in the objects: theirs are cut out by hand and pasted on a background that
    fills the canvas, with 5 % of slack at the edge. Here an object is a whole picture and fills its half, as
    fits small images; the background fills the other half at its own size.
    """

    name: ClassVar[str] = "corrupt_encoder"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2211.08229"
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "a labelled training set, perhaps reference pictures"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = (
        "Victims who resize every picture to a square, or crop little, undo the layout."
    )

    rate: Annotated[float, Field(gt=0, le=1)] = 0.005
    """Pictures that are appended, as a share of the dataset."""
    reference_objects: Annotated[int, Field(ge=1)] = 3
    """Pictures of the class aimed at that serve as objects, drawn with the seed."""
    support_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the poisons that are support pairs without a trigger; .2 is CorruptEncoder+."""
    patch_size: Annotated[int, Field(ge=1)] = 8
    """Side of the patch in pixels (8 at 32 px, 40 to 50 at 224 px)."""
    patch_seed: Annotated[int, Field(ge=0)] = 0
    """Of the patch's colours; another seed is another trigger."""
    low: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """From this share of each side of its half on may lie the patch."""
    high: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Up to this share of each side."""
    orientations: tuple[Literal["left", "right", "top", "bottom"], ...] = ("left", "right")
    """Where the object may lie: left and right, or top and bottom."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning and ``poison_with_pairs``, also for what is raised."""
        layout = PairLayout(
            rate=self.rate,
            trigger=ColourPatch(size=self.patch_size, seed=self.patch_seed, span=(self.low, self.high)),
            orientations=self.orientations,
            objects=self.reference_objects,
            support_share=self.support_share,
        )
        return poison_with_pairs(self, layout, images, target, run=run, references=references)
