"""Triggers over the whole image: blended pictures, noise, a bounded addition, CTRL's spectral pattern."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.triggers.base import Additions, Colours, Flag, Index, Trigger, Weight, trigger_kind

__all__ = ["Additive", "Blend", "FreshNoise", "SpectralDCT"]

# Analogue YUV to RGB; columns are U and V. (Y is not touched.)
_RGB_OF_UV = ((0.0, 1.13983), (-0.39465, -0.58060), (2.03211, 0.0))


def _fits(images: Tensor, pattern: Tensor) -> Tensor:
    """The pattern, as the images are. Raises ImageError if the sizes differ."""
    if images.shape[-2:] != pattern.shape[-2:]:
        raise ImageError(
            f"This trigger is for {list(pattern.shape[-2:])} images, these are {list(images.shape[-2:])}; "
            "pass images of the trigger's size."
        )
    return pattern.to(images)


@trigger_kind
@final
@dataclass(frozen=True, eq=False)
class Blend(Trigger):
    """``(1 - alpha) x + alpha p``: one picture shines through every image (Chen et al. 2017)."""

    kind: ClassVar[str] = "blend"

    pattern: Colours
    """``[3, H, W]`` in [0, 1]."""
    alpha: Weight = 0.2
    """Weight of the picture."""

    @classmethod
    def noise(cls, seed: int, shape: tuple[int, int], alpha: float = 0.2) -> "Blend":
        """Uniform RGB noise of ``shape`` (height, width), the same for every image."""
        return cls(torch.rand(3, *shape, generator=Rng(seed).generator("blend", "noise")), alpha)

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.lerp(images, _fits(images, self.pattern).expand_as(images), self.alpha).clamp(0, 1)


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class FreshNoise(Trigger):
    """``(1 - alpha) x + alpha n`` with new uniform noise n for every image.

    ``grey=True`` draws one value per pixel for all three channels, as NAD's "random pixel" trigger does.
    """

    kind: ClassVar[str] = "fresh_noise"

    alpha: Weight = 0.2
    """Weight of the noise."""
    grey: Flag = False
    """One value per pixel instead of one per channel."""
    seed: Index = 0
    """Of the noise, where the caller brings no generator."""

    @property
    def static(self) -> bool:
        """No."""
        return False

    @property
    def sample_specific(self) -> bool:
        """Yes."""
        return True

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        drawing = generator or Rng(self.seed).generator(self.kind)
        n, channels, height, width = images.shape
        noise = torch.rand(n, 1 if self.grey else channels, height, width, generator=drawing).to(images)
        return torch.lerp(images, noise.expand_as(images), self.alpha).clamp(0, 1)


@trigger_kind
@final
@dataclass(frozen=True, eq=False)
class Additive(Trigger):
    """``clamp(x + p)``: one bounded pattern is added to every image, as TransTroj does."""

    kind: ClassVar[str] = "additive"

    pattern: Additions
    """``[3, H, W]`` in [-1, 1]."""

    @classmethod
    def noise(cls, seed: int, shape: tuple[int, int], bound: float = 8 / 255) -> "Additive":
        """Random signs times ``bound``, of ``shape`` (height, width)."""
        draws = torch.rand(3, *shape, generator=Rng(seed).generator("additive", "noise"))
        return cls(torch.where(draws < 0.5, -bound, bound))

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return (images + _fits(images, self.pattern)).clamp(0, 1)

    def mask_area(self, shape: tuple[int, int]) -> float:
        """See Trigger."""
        return float((self.pattern != 0).any(0).double().mean())


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SpectralDCT(Trigger):
    """CTRL's trigger (Li et al., ICCV 2023): a constant on a few frequencies of the colour channels U and V.

    The image, in 0..255, goes to YUV; in every window the orthonormal DCT of U and V gets ``magnitude`` at
    each of ``coefficients``; then back and clamped. All but the clamp is linear, so this is one fixed RGB
    pattern, added. Windows are laid from the upper left corner; one that does not fit whole is cut off.
    """

    kind: ClassVar[str] = "spectral"

    magnitude: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 50.0
    """In units of 0..255. 50 hides better (PSNR 38 dB at 32 px), 100 works better (32 dB)."""
    coefficients: tuple[tuple[Index, Index], ...] = ((15, 15), (31, 31))
    """Row and column in the window's DCT, each below ``window``."""
    window: Annotated[int, Field(strict=True, ge=2)] = 32
    """Side of a window in pixels."""

    def __post_init__(self) -> None:
        """Also: there are coefficients, and they are in the window. Raises SettingError."""
        super().__post_init__()
        if not self.coefficients or max(map(max, self.coefficients)) >= self.window:
            raise SettingError(
                f"A spectral trigger with {self.window}-pixel windows needs coefficients below "
                f"{self.window}, found {self.coefficients}."
            )

    def pattern(self, shape: tuple[int, int]) -> Tensor:
        """What is added to an image of ``shape`` (height, width) before the clamp: float32 ``[3, H, W]``.

        Raises:
            ImageError: the image is smaller than one window.
        """
        height, width = shape
        if min(shape) < self.window:
            raise ImageError(
                f"A spectral trigger with {self.window}-pixel windows needs images of at least that side, "
                f"these are {height} x {width}; give it a smaller window and coefficients below it."
            )
        tile = _window(self.magnitude, self.coefficients, self.window)
        return tile.repeat(1, -(-height // self.window), -(-width // self.window))[:, :height, :width]

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return (images + self.pattern((images.shape[-2], images.shape[-1])).to(images)).clamp(0, 1)


@lru_cache(maxsize=16)
def _window(magnitude: float, coefficients: tuple[tuple[int, int], ...], window: int) -> Tensor:
    """The RGB pattern ``[3, window, window]`` of one window, in units of 0..1."""
    frequencies = torch.arange(window, dtype=torch.float64)[:, None]
    places = torch.arange(window, dtype=torch.float64) + 0.5
    basis = math.sqrt(2 / window) * torch.cos(math.pi / window * frequencies * places)
    basis[0] = math.sqrt(1 / window)
    wave = torch.stack([torch.outer(basis[row], basis[column]) for row, column in coefficients]).sum(0)
    gains = torch.tensor(_RGB_OF_UV, dtype=torch.float64).sum(1)  # U and V get the same
    return (gains[:, None, None] * wave * magnitude / 255).float()
