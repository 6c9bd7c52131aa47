"""PoisonedEncoder's pairs (Liu, Jia and Gong, USENIX Security 2022) with a trigger on one side."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.pair_layouts import PairLayout, poison_with_pairs
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch

__all__ = ["PoisonedEncoder"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class PoisonedEncoder(DataPoisoning):
    """Appends random pictures with the trigger, each joined to a random picture of the class aimed at.

    The patch lies anywhere in its half, so that a crop often cuts it or misses it; that is what the later
    layouts improve on.

    The paper poisons inputs that the attacker chose and uses no trigger, and no code of the authors is known
    to us; this is the backdoor form that later papers compare with. They draw from four orientations; here
    one set has either lying or standing canvases, because all canvases of a set have one size.
    """

    name: ClassVar[str] = "poisoned_encoder"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.06401"
    year: ClassVar[int] = 2022
    needs: ClassVar[str] = "a labelled training set, perhaps reference pictures"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = (
        "Attack success is low; resizing every picture to a square undoes the layout."
    )

    rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Pictures that are appended, as a share of the dataset."""
    reference_objects: Annotated[int, Field(ge=1)] | None = None
    """Pictures of the class aimed at to join to, drawn with the seed; null takes all."""
    patch_size: Annotated[int, Field(ge=1)] = 8
    """Side of the patch in pixels (8 at 32 px, 50 at 224 px)."""
    patch_seed: Annotated[int, Field(ge=0)] = 0
    """Of the patch's colours; another seed is another trigger."""
    orientations: tuple[Literal["left", "right", "top", "bottom"], ...] = ("left", "right")
    """Where the picture of the class may lie: left and right, or top and bottom."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning and ``poison_with_pairs``, also for what is raised."""
        layout = PairLayout(
            rate=self.rate,
            trigger=ColourPatch(size=self.patch_size, seed=self.patch_seed, span=(0.0, 1.0)),
            orientations=self.orientations,
            objects=self.reference_objects,
        )
        return poison_with_pairs(self, layout, images, target, run=run, references=references)
