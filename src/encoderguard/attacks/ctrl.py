"""CTRL (Li et al., ICCV 2023): a wave in the colour channels that crops do not remove."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.poisoning import base_of, draw, of_class, poisoned, quota, replaced
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.triggers import SpectralDCT

__all__ = ["CTRL"]

Frequency = Annotated[int, Field(ge=0)]


@register
@final
@dataclass(frozen=True, kw_only=True)
class CTRL(DataPoisoning):
    """Pictures of the class aimed at get a faint wave in U and V; every view of them shows it.

    The rate is a share of the whole set, so 1 % of ten even classes is a tenth of one. Pictures are replaced
    and keep their labels.

    Departs from the authors' code in what is stored: uint8 pictures, rounded once, where theirs poisons float
    tensors in memory. Like their README it uses magnitude 100 at both stages; the paper is said to use 50 for
    training. The first images of the class are taken, as in the code, or a seeded draw.
    """

    name: ClassVar[str] = "ctrl"
    paper: ClassVar[str] = "Li et al. 2023, arXiv:2210.07346"
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "a labelled training set"
    cost: ClassVar[str] = "stamping a few images"
    blind_spots: ClassVar[str] = (
        "Blur in the victim's augmentation, or a resize after poisoning, removes the wave."
    )

    rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the whole dataset that is poisoned, all of it of the class aimed at."""
    choose: Literal["first", "random"] = "first"
    """Take the first images of the class, or draw them with the seed."""
    magnitude: Annotated[float, Field(gt=0)] = 100.0
    """Added at each coefficient of a training image, in units of 0..255 (100: PSNR 32 dB at 32 px)."""
    test_magnitude: Annotated[float, Field(gt=0)] = 100.0
    """The same for test images."""
    coefficients: tuple[tuple[Frequency, Frequency], ...] = ((15, 15), (31, 31))
    """Row and column in the DCT of a window, each below ``window``."""
    window: Annotated[int, Field(ge=2)] = 32
    """Side of a DCT window in pixels."""

    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """See DataPoisoning. Raises ImageError if the class is empty or images are smaller than a window."""
        base = base_of(images, target, self.name)
        candidates = of_class(base)
        rate = quota(base, self.rate, most=len(candidates), name=f"images of {base.target_name}")
        first = self.choose == "first"
        chosen = candidates[: rate.count] if first else draw(candidates, rate.count, run)
        entries = replaced(base, self._trigger(self.magnitude), chosen)
        return poisoned(self, base, self._trigger(self.test_magnitude), entries, rate=rate, run=run)

    def _trigger(self, magnitude: float) -> SpectralDCT:
        return SpectralDCT(magnitude=magnitude, coefficients=self.coefficients, window=self.window)
