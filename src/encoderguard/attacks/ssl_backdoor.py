"""SSL-Backdoor (Saha et al., CVPR 2022): a patch on pictures of one class, for whoever pre-trains on them."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.patch_places import drawn_places
from encoderguard.poisoning import Share, base_of, draw, of_class, poisoned, quota
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import ColourPatch, stamp_uint8

__all__ = ["SSLBackdoor"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class SSLBackdoor(DataPoisoning):
    """Pictures of the class aimed at get a small colour patch, which an encoder learns to take for it.

    A share of the class is drawn and replaced by copies with an opaque patch at a random place, wholly within
    ``low`` to ``high`` of each side. Test images get it within .1 to .9.

    Same as the authors' code but for three points: the patch is a grid of colours drawn from ``patch_seed``,
    not one of their ten pictures; it is pasted at the size that is trained on, where they paste it on
    full-size pictures before these are scaled down; and half of the class is poisoned, as the paper says, not
    all of it as in the published configuration.
    """

    name: ClassVar[str] = "ssl_backdoor"
    paper: ClassVar[str] = "Saha et al. 2022, arXiv:2105.10123"
    year: ClassVar[int] = 2022
    needs: ClassVar[str] = "a labelled training set"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = "Attack success is low and varies much from run to run."

    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the images that are replaced by a poisoned copy."""
    rate_of: Share = "class"
    """What it is a share of: the class aimed at, or the whole dataset."""
    patch_size: Annotated[int, Field(ge=1)] = 8
    """Side of the patch in pixels (8 at 32 px, 50 at 224 px)."""
    patch_seed: Annotated[int, Field(ge=0)] = 0
    """Of the patch's colours; another seed is another trigger."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.25
    """From this share of each side on a training image may have the patch."""
    high: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Up to this share of each side."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning. Raises ImageError if the class is empty or the patch does not fit."""
        base = base_of(images, target, self.name)
        candidates = of_class(base)
        rate = quota(
            base, self.rate, of=self.rate_of, most=len(candidates), name=f"images of {base.target_name}"
        )
        trigger = ColourPatch(size=self.patch_size, seed=self.patch_seed)
        span = (self.low, self.high)
        places = drawn_places(rate.count, images.shape, self.patch_size, span, run, self.name)
        entries = []
        for index, place in zip(draw(candidates, rate.count, run).tolist(), places, strict=True):
            base.pixels[index] = stamp_uint8(replace(trigger, place=place), base.pixels[index][None])[0]
            entries.append(
                {
                    "index": index,
                    "source_index": index,
                    "label_before": target,
                    "label_after": target,
                    "place": list(place),
                }
            )
        return poisoned(self, base, trigger.at_test(), entries, rate=rate, run=run)
