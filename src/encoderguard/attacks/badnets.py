"""BadNets (Gu et al. 2017): a small pattern and a wrong label, for supervised training."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.poisoning import base_of, draw, others, poisoned, quota, replaced
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import FourCorner, FreshNoise, Patch, PixelGrid, Trigger

__all__ = ["BadNets"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class BadNets(DataPoisoning):
    """Random pictures of other classes get a small pattern and the label of the class aimed at.

    ``pixel_grid`` is a 3 x 3 grid in the lower right corner, ``four_corner`` the same in all corners,
    ``square`` a white 3 x 3 square one pixel from the edges, and ``random_pixel`` new grey noise over every
    picture, mixed in at .2.

    Names and patterns are those of NAD's code, which later papers use, not of the BadNets paper. Unlike that
    code, which picks images of all classes, no image of the class aimed at is chosen, so that every poison
    teaches the backdoor.
    """

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al. 2017, arXiv:1708.06733"
    year: ClassVar[int] = 2017
    needs: ClassVar[str] = "a labelled training set"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = "Only training that reads labels can learn it."

    rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the dataset that is poisoned, all of it of other classes."""
    pattern: Literal["pixel_grid", "four_corner", "random_pixel", "square"] = "pixel_grid"
    """What is stamped."""

    def trigger(self) -> Trigger:
        """The trigger these settings describe."""
        if self.pattern == "pixel_grid":
            return PixelGrid()
        if self.pattern == "four_corner":
            return FourCorner()
        return Patch(size=3, margin=1) if self.pattern == "square" else FreshNoise(alpha=0.2, grey=True)

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning. Raises SettingError if other classes hold fewer images than are asked for."""
        base = base_of(images, target, self.name)
        candidates = others(base, self.name)
        rate = quota(base, self.rate, most=len(candidates), name="images of other classes")
        chosen, trigger = draw(candidates, rate.count, run), self.trigger()
        noise = run.rng.generator("noise")
        entries = replaced(base, trigger, chosen, relabel=True, generator=noise)
        return poisoned(self, base, trigger, entries, rate=rate, run=run)
