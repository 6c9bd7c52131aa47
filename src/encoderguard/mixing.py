"""How recovered patterns get into images: squares at random places, or learnt masks."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.random import Rng

__all__ = ["Mix", "Mixing", "enlarged"]

Mix = Literal["patch", "mask"]
_GRID = 16
"""Patterns have at most this many pixels a side; larger ones are enlarged bilinearly."""
_MASK_GAIN = 100.0
"""Steps of a mask are so much longer than those of the generators' weights."""
_FLAT = 3.0


class Mixing(nn.Module):
    """``Mix(x, pattern)`` (SSLDefender Eq. 1).

    Args:
        mix: ``patch``: a square at a random place of each image; ``mask``: one learnt mask per sub-generator.
        count: n, the sub-generators.
        shape: height and width of the images.
        rng: where masks start.
        patch: side of the square over the image's smaller side.
    """

    def __init__(self, mix: Mix, count: int, shape: tuple[int, int], rng: Rng, *, patch: float) -> None:
        super().__init__()
        self.mix, self.shape = mix, shape
        self.side = max(1, round(patch * min(shape)))
        if mix == "mask":
            start = torch.stack([torch.rand(shape, generator=rng.generator("mask", i)) for i in range(count)])
            self.raw = nn.Parameter(torch.atanh((start - 0.5) * (2 - 1e-6)) / _MASK_GAIN)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a pattern as it is generated."""
        height, width = (self.side, self.side) if self.mix == "patch" else self.shape
        return min(_GRID, height), min(_GRID, width)

    @torch.no_grad()
    def awaken(self) -> None:
        """Keep masks off the flat ends of tanh, from which no gradient would bring a pixel back."""
        if self.mix == "mask":
            self.raw.clamp_(-_FLAT / _MASK_GAIN, _FLAT / _MASK_GAIN)

    def shown(self, patterns: Tensor) -> Tensor:
        """What of ``patterns [n, K, 3, h, w]`` gets into images: ``[n, K, 3 h w]`` in [-1, 1]."""
        patterns = 2 * patterns - 1
        if self.mix == "mask":
            patterns = patterns * F.adaptive_max_pool2d(self.masks, self.size)[:, None, None]
        return patterns.flatten(2)

    @property
    def masks(self) -> Tensor:
        """``[n, H, W]`` in [0, 1]."""
        return torch.tanh(_MASK_GAIN * self.raw) / 2 + 0.5

    def forward(self, images: Tensor, patterns: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """Stamp ``patterns [M, 3, h, w]`` of the sub-generators ``which [M]`` on ``images [M, 3, H, W]``."""
        if self.mix == "mask":
            full = enlarged(patterns, self.shape)
            return torch.lerp(images, full, self.masks[which][:, None])
        side, count = self.side, len(images)
        draws = torch.rand(2, count, 1, generator=generator).to(images.device)
        room = torch.tensor(self.shape, device=images.device).view(2, 1, 1) - side + 1
        rows, columns = (draws * room).long() + torch.arange(side, device=images.device)
        stamped, every = images.clone(), torch.arange(count, device=images.device)
        places = (every[:, None, None], slice(None), rows[:, :, None], columns[:, None, :])
        stamped[places] = enlarged(patterns, (side, side)).permute(0, 2, 3, 1).to(images)
        return stamped


def enlarged(patterns: Tensor, size: tuple[int, int]) -> Tensor:
    """Patterns ``[M, 3, h, w]`` as ``[M, 3, *size]``."""
    if tuple(patterns.shape[-2:]) == size:
        return patterns
    return F.interpolate(patterns, size, mode="bilinear", align_corners=False)
