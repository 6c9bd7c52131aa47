"""Triggers that change colours or geometry of the whole image: what filters and warping attacks do."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoderguard.random import Rng
from encoderguard.triggers.base import Trigger, trigger_kind

__all__ = ["ColourMap", "Warp"]

_Row = tuple[float, float, float]


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ColourMap(Trigger):
    """``(1 - s) x + s clamp(M x + b)`` per pixel: tints, contrast, saturation, hue, photo filters."""

    kind: ClassVar[str] = "colour_map"

    matrix: tuple[_Row, _Row, _Row]
    """M: row i holds the shares of red, green and blue in new channel i."""
    offset: _Row = (0.0, 0.0, 0.0)
    """b, in units of 0..1."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """s: how much of the change is made."""

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        changed = torch.einsum("ij,njhw->nihw", images.new_tensor(self.matrix), images)
        changed = (changed + images.new_tensor(self.offset).view(3, 1, 1)).clamp(0, 1)
        return torch.lerp(images, changed, self.strength).clamp(0, 1)


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Warp(Trigger):
    """A smooth random displacement of the pixels, as in WaNet (Nguyen and Tran 2021, arXiv:2102.10369).

    A ``grid`` x ``grid`` field of random displacements, divided by its mean length, is enlarged with cubic
    interpolation; pixels from outside are reflected.
    """

    kind: ClassVar[str] = "warp"

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the field."""
    grid: Annotated[int, Field(ge=2)] = 4
    """Places per side at which displacements are drawn."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Mean displacement at those places, as a share of the image's side."""

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = images.shape[-2:]
        coarse = 2 * torch.rand(1, 2, self.grid, self.grid, generator=Rng(self.seed).generator(self.kind)) - 1
        coarse = coarse / coarse.norm(dim=1).mean()
        field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        same = F.affine_grid(torch.eye(2, 3)[None], [1, 3, height, width], align_corners=False)
        grid = (same + 2 * self.strength * field.permute(0, 2, 3, 1)).to(
            images
        )  # the image's side is 2 units
        grid = grid.expand(len(images), -1, -1, -1)
        moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        return moved.clamp(0, 1)
