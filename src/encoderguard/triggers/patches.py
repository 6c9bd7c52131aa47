"""Triggers that replace a part of the image: a square, a colour patch, a mask with a pattern."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.triggers.base import Colours, Count, Flag, Index, Mask, Share, Trigger, Weight, trigger_kind

__all__ = ["ColourPatch", "MaskedPattern", "Patch"]

# (side of the image, side of the square): margin; where the published trigger files have their white squares
_FIELD_MARGINS = {(32, 10): 1, (64, 20): 2, (224, 24): 15, (224, 50): 1}
_FIELD_SIZES = {32: 10, 64: 20, 224: 50}


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Patch(Trigger):
    """A square of one brightness in the lower right corner (BadEncoder: white, 10 px, margin 1 at 32 px).

    With the defaults rows and columns 21-30 of a 32 x 32 image are replaced, as in the field's own trigger
    file. NAD's white square is ``Patch(size=3, margin=1)``.
    """

    kind: ClassVar[str] = "patch"

    size: Count = 10
    """Side in pixels."""
    margin: Index = 1
    """Pixels between the square and the right and the lower edge."""
    value: Share = 1.0
    """Brightness."""

    @classmethod
    def field(cls, image_size: int, size: int | None = None) -> "Patch":
        """The white square where the field's trigger files have it, on square images.

        Published are 10 px at 32 (rows and columns 21-30), 20 at 64 (42-61), 24 at 224 (185-208, DECREE) and
        50 at 224 (173-222, BadEncoder). Other sizes have a margin of one pixel. Without ``size`` it is the
        largest published one for that side, or 10/32 of a side up to 96 px and 50/224 of a larger one.
        """
        if size is None:
            share = 10 / 32 if image_size <= 96 else 50 / 224
            size = _FIELD_SIZES.get(image_size, max(1, round(share * image_size)))
        return cls(size=size, margin=_FIELD_MARGINS.get((image_size, size), 1))

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = images.shape[-2:]
        top, left = height - self.margin - self.size, width - self.margin - self.size
        if min(top, left) < 0:
            raise ImageError(
                f"A {self.size}-pixel patch with margin {self.margin} does not fit "
                f"into {height} x {width} images."
            )
        stamped = images.clone()
        stamped[..., top : top + self.size, left : left + self.size] = self.value
        return stamped

    def mask_area(self, shape: tuple[int, int]) -> float:
        """See Trigger."""
        return self.size**2 / (shape[0] * shape[1])


@trigger_kind
@final
@dataclass(frozen=True, eq=False)
class MaskedPattern(Trigger):
    """``(1 - m) x + m t``: the mask ``m`` is 1 where the pattern ``t`` *replaces* the image."""

    kind: ClassVar[str] = "masked_pattern"

    mask: Mask
    """``[H, W]`` in [0, 1]."""
    pattern: Colours
    """``[3, H, W]`` in [0, 1]."""

    def __post_init__(self) -> None:
        """Also: both are of one size. Raises SettingError."""
        super().__post_init__()
        if self.mask.shape != self.pattern.shape[1:]:
            raise SettingError(
                f"Mask and pattern of a masked_pattern trigger must be of one size, "
                f"found {list(self.mask.shape)} and {list(self.pattern.shape[1:])}."
            )

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if images.shape[-2:] != self.mask.shape:
            raise ImageError(
                f"This trigger is for {list(self.mask.shape)} images, these are {list(images.shape[-2:])}; "
                "pass images of the trigger's size."
            )
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return ((1 - mask) * images + mask * pattern).clamp(0, 1)

    def mask_area(self, shape: tuple[int, int]) -> float:
        """The share of pixels with a mask above 0."""
        return float((self.mask > 0).double().mean())


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ColourPatch(Trigger):
    """A square of colours, at one place or at a new random place in every image.

    SSL-Backdoor's (Saha et al., CVPR 2022): a random RGB grid of 4 x 4, enlarged bilinearly, opaque; the
    whole square lies within .25-.75 of each side of a poisoned image and within .10-.90 of a test image. The
    authors' ten patches are pictures; ``seed`` draws others of that make. ``colours`` gives the grid itself:
    ``ColourPatch.solid`` is a square of one colour.
    """

    kind: ClassVar[str] = "colour_patch"

    size: Count = 8
    """Side in pixels (8 at 32 px, 50 at 224 px)."""
    seed: Index = 0
    """Of the colours, and of the places where the caller brings no generator."""
    grid: Count = 4
    """Cells per side of the drawn grid."""
    colours: Colours | None = None
    """``[3, G, G]`` in [0, 1]: the grid itself; drawn from the seed if None."""
    smooth: Flag = True
    """Enlarge the grid bilinearly, else by whole cells (nearest)."""
    opacity: Weight = 1.0
    """Weight of the patch against the image below."""
    place: tuple[Index, Index] | None = None
    """Row and column of the upper left corner; None draws a place for every image."""
    span: tuple[Share, Share] = (0.25, 0.75)
    """From where to where on each side, as shares of it, a drawn place may have the patch."""
    test_span: tuple[Share, Share] = (0.10, 0.90)
    """The same on test images; see ``at_test``."""

    def __post_init__(self) -> None:
        """Also: a span goes upwards. Raises SettingError."""
        super().__post_init__()
        for name in ("span", "test_span"):
            low, high = getattr(self, name)
            if low >= high:
                raise SettingError(
                    f"'{name}' of a {self.kind} trigger must go upwards, found {low:g} to {high:g}."
                )

    @classmethod
    def solid(
        cls, colour: Sequence[float], size: int, place: tuple[int, int] | None = None, opacity: float = 1.0
    ) -> "ColourPatch":
        """A square of one colour (red, green, blue in [0, 1])."""
        grid = torch.tensor(colour, dtype=torch.float32).reshape(-1, 1, 1)
        return cls(size=size, colours=grid, smooth=False, place=place, opacity=opacity)

    @property
    def static(self) -> bool:
        """Whether the place is fixed."""
        return self.place is not None

    @property
    def patch(self) -> Tensor:
        """The colours of the square: float32 ``[3, size, size]`` in [0, 1]."""
        grid = self.colours
        if grid is None:
            grid = torch.rand(
                3, self.grid, self.grid, generator=Rng(self.seed).generator(self.kind, "colours")
            )
        mode = "bilinear" if self.smooth else "nearest"
        return F.interpolate(grid[None].float(), size=(self.size, self.size), mode=mode)[0]

    def at_test(self) -> "ColourPatch":
        """The copy that draws its places from ``test_span``."""
        return self if self.place is not None else replace(self, span=self.test_span)

    def mask_area(self, shape: tuple[int, int]) -> float:
        """Of one image: the patch, wherever it is."""
        return self.size**2 / (shape[0] * shape[1])

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        tops, lefts = self._places(len(images), (images.shape[-2], images.shape[-1]), generator)
        offsets = torch.arange(self.size)
        rows = (tops[:, None] + offsets)[:, :, None].to(images.device)
        columns = (lefts[:, None] + offsets)[:, None, :].to(images.device)
        which = torch.arange(len(images), device=images.device)[:, None, None]
        patch = self.patch.to(images).permute(1, 2, 0)
        stamped = images.clone()
        by_pixel = stamped.permute(0, 2, 3, 1)  # a view: what is written here is written into `stamped`
        below = by_pixel[which, rows, columns]
        by_pixel[which, rows, columns] = torch.lerp(below, patch.expand_as(below), self.opacity).clamp(0, 1)
        return stamped

    def _places(
        self, n: int, shape: tuple[int, int], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns ``[N]`` of the upper left corners."""
        if self.place is not None:
            if any(start + self.size > side for start, side in zip(self.place, shape, strict=True)):
                raise ImageError(
                    f"A {self.size}-pixel patch at row {self.place[0]}, column {self.place[1]} does not fit "
                    f"into {shape[0]} x {shape[1]} images."
                )
            return torch.full((n,), self.place[0]), torch.full((n,), self.place[1])
        drawn = torch.rand(n, 2, generator=generator or Rng(self.seed).generator(self.kind, "places"))
        low, high = self.span
        starts = [int(low * side) for side in shape]
        counts = [int(high * side) - self.size - start + 1 for start, side in zip(starts, shape, strict=True)]
        if min(counts) < 1:
            raise ImageError(
                f"A {self.size}-pixel patch does not fit between {low:g} and {high:g} of the sides of "
                f"{shape[0]} x {shape[1]} images; make it smaller or its span wider."
            )
        places = (drawn * torch.tensor(counts)).long() + torch.tensor(starts)
        return places[:, 0], places[:, 1]
