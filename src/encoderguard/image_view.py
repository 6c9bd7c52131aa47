"""Chosen rows of a storage as pixels of one size, decoded once where they fit in memory."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.image_sources import MEMORY_BUDGET
from encoderguard.image_storage import Arrays, Storage

__all__ = ["View", "by", "common_size"]


class View:
    """Chosen rows of a storage at one size; decoded pixels are kept where all of them fit the budget.

    The first read of a picture decodes it. With parquet, the other chosen rows of its row group come along,
    so that batches in random order do not read every row group again and again.
    """

    def __init__(self, storage: Storage, rows: Tensor, shape: tuple[int, int], size: int | None) -> None:
        self.storage, self.rows, self.shape, self.size = storage, rows, shape, size
        in_memory = isinstance(storage, Arrays) and tuple(storage.pixels.shape[-2:]) == shape
        self._keeps = not in_memory and len(rows) * 3 * shape[0] * shape[1] <= MEMORY_BUDGET
        self._kept: Tensor | None = None  # allocated at first use; untouched pages cost nothing
        self._have = torch.zeros(len(rows) if self._keeps else 0, dtype=torch.bool)

    @property
    def complete(self) -> bool:
        """Whether every picture is decoded and kept."""
        return self._kept is not None and bool(self._have.all())

    def take(self, positions: Tensor) -> Tensor:
        """A new uint8 tensor ``[n, 3, H, W]``.

        Raises:
            ImageError: a picture cannot be read, or changed its size.
        """
        if not self._keeps:
            return self._read(positions, torch.empty(len(positions), 3, *self.shape, dtype=torch.uint8))
        if self._kept is None:
            self._kept = torch.empty(len(self.rows), 3, *self.shape, dtype=torch.uint8)
        missing = positions[~self._have[positions]]
        if len(missing):
            group = self.storage.group(self.rows)
            missing = torch.nonzero(torch.isin(group, group[missing]) & ~self._have)[:, 0]
            self._read(missing, self._kept, missing)
            self._have[missing] = True
        return self._kept[positions]

    def _read(self, positions: Tensor, target: Tensor, places: Tensor | None = None) -> Tensor:
        rows = self.rows[positions]
        for found, pixels in self.storage.read(rows, self.size):
            if tuple(pixels.shape[-2:]) != self.shape:
                name = self.storage.name(int(rows[found]))
                raise ImageError(
                    f"{name} is now {by(pixels.shape[-2:])}, the set was opened with {by(self.shape)}; "
                    "leave the pictures unchanged while they are in use."
                )
            target[found if places is None else places[found]] = pixels
        return target


def by(shape: Sequence[int] | NDArray[np.int32]) -> str:
    """Height and width for a message."""
    return f"{int(shape[0])}x{int(shape[1])}"


def common_size(storage: Storage, rows: Tensor, sizes: NDArray[np.int32]) -> tuple[int, int]:
    """The one height and width of these rows.

    Raises:
        ImageError: two sizes; both are named.
    """
    kept = sizes[rows.numpy()]
    first = kept[0]
    if len(others := np.flatnonzero((kept != first).any(axis=1))):
        other = int(others[0])
        raise ImageError(
            f"The pictures differ in size: {storage.name(int(rows[0]))} is {by(first)}, "
            f"{storage.name(int(rows[other]))} is {by(kept[other])} (height x width); "
            "bring all to one size with --image-size."
        )
    return int(first[0]), int(first[1])
