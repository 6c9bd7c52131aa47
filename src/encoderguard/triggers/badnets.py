"""The small grids of BadNets (Gu et al. 2017), with the tables of NAD's code, which later papers use."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.triggers.base import Trigger, trigger_kind

__all__ = ["FourCorner", "PixelGrid"]

# Rows and columns count inwards from the corner; the cell farthest from it is black.
_CELLS = ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
_SIDE = len(_CELLS)


def _need(images: Tensor, least: int, what: str) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise ImageError(f"{what} needs images of at least {least} x {least}, these are {height} x {width}.")


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class PixelGrid(Trigger):
    """Nine black and white pixels in the lower right corner, without a margin.

    From top to bottom ``0 0 255``, ``0 255 0``, ``255 0 255``: the upper left of the nine is black.
    """

    kind: ClassVar[str] = "pixel_grid"

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        _need(images, _SIDE, "The pixel grid")
        stamped = images.clone()
        stamped[..., -_SIDE:, -_SIDE:] = images.new_tensor(_CELLS).flip((0, 1))
        return stamped

    def mask_area(self, shape: tuple[int, int]) -> float:
        """See Trigger."""
        return _SIDE**2 / (shape[0] * shape[1])


@trigger_kind
@final
@dataclass(frozen=True, eq=False, kw_only=True)
class FourCorner(Trigger):
    """The pixel grid in all four corners, turned so that its two white ends point along the edges.

    At the top and at the left the cells start at index 1, not 0, as in NAD's code; at the bottom and at the
    right they touch the edge.
    """

    kind: ClassVar[str] = "four_corner"

    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        _need(images, 2 * _SIDE + 1, "The four-corner trigger")
        stamped, cells = images.clone(), images.new_tensor(_CELLS)
        near, far = slice(1, 1 + _SIDE), slice(-_SIDE, None)
        stamped[..., near, near] = cells
        stamped[..., near, far] = cells.flip(1)
        stamped[..., far, near] = cells.flip(0)
        stamped[..., far, far] = cells.flip((0, 1))
        return stamped

    def mask_area(self, shape: tuple[int, int]) -> float:
        """See Trigger."""
        return 4 * _SIDE**2 / (shape[0] * shape[1])
