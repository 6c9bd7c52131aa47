"""Where pixels lie before they are a tensor: an array, a folder of files, or parquet shards.

A storage never holds more decoded pixels than one window of pictures; what is kept is the caller's choice.
"""

# ruff: noqa: D102 (methods are documented once, on Storage)

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.image_decoding import Item, decode, fit, header_size, naming

__all__ = ["Arrays", "Files", "Shards", "Storage", "Survey"]

_WINDOW = 256  # pictures in flight at once
_PIECE = 16  # pictures per thread task

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """Height and width per row, int32 ``[N, 2]``, and the rows that cannot be read."""

    sizes: NDArray[np.int32]
    bad: tuple[int, ...] = ()


class Storage(ABC):
    """Rows of pictures. ``rows`` below are int64 tensors of row numbers in any order."""

    kind: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """What to call this picture in a message."""

    @abstractmethod
    def read(self, rows: Tensor, size: int | None) -> Iterator[tuple[int | slice, Tensor]]:
        """Yield positions in ``rows`` with their uint8 pixels ``[3, H, W]`` or ``[n, 3, H, W]``."""

    @abstractmethod
    def hashes(self, rows: Tensor) -> NDArray[np.uint8]:
        """The sha256 of the content of every row, ``[n, 32]``."""

    @abstractmethod
    def survey(self, *, full: bool, skip: bool) -> Survey:
        """The size of every picture; ``full`` also decodes it; ``skip`` lists bad rows instead of raising."""

    def group(self, rows: Tensor) -> Tensor:
        """Rows with the same number are cheapest read together."""
        return rows


class Arrays(Storage):
    """Pixels in memory or memory-mapped: uint8 ``[N, 3, H, W]``, any strides."""

    kind = "pixels"

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, row: int) -> str:
        return f"image {row}"

    def read(self, rows: Tensor, size: int | None) -> Iterator[tuple[int | slice, Tensor]]:
        for start in range(0, len(rows), _WINDOW):
            part = slice(start, start + _WINDOW)
            yield part, fit(self.pixels[rows[part]], size)

    def hashes(self, rows: Tensor) -> NDArray[np.uint8]:
        found = np.empty((len(rows), 32), np.uint8)
        for position, row in enumerate(rows.numpy()):
            found[position] = _sha256(self.pixels[int(row)].contiguous().numpy().data)
        return found

    def survey(self, *, full: bool, skip: bool) -> Survey:
        return Survey(np.broadcast_to(np.array(self.pixels.shape[-2:], np.int32), (len(self), 2)))


class Encoded(Storage):
    """Pictures decoded on demand by a few threads (Pillow's decoders release the interpreter lock)."""

    @abstractmethod
    def items(self, rows: Tensor) -> Iterator[tuple[int, str, Item]]:
        """Yield (position in ``rows``, name, encoded picture) in the cheapest order."""

    def read(self, rows: Tensor, size: int | None) -> Iterator[tuple[int | slice, Tensor]]:
        yield from self._each(rows, lambda name, item: fit(decode(item, name), size))

    def hashes(self, rows: Tensor) -> NDArray[np.uint8]:
        def content(name: str, item: Item) -> NDArray[np.uint8]:
            with naming(name):
                return _sha256(item if isinstance(item, bytes) else item.read_bytes())

        found = np.empty((len(rows), 32), np.uint8)
        for position, digest in self._each(rows, content):
            found[position] = digest
        return found

    def survey(self, *, full: bool, skip: bool) -> Survey:
        def look(name: str, item: Item) -> tuple[int, ...]:
            try:
                return tuple(decode(item, name).shape[1:]) if full else header_size(item, name)
            except ImageError:
                if not skip:
                    raise
                return (0, 0)

        sizes = np.zeros((len(self), 2), np.int32)
        for row, found in self._each(torch.arange(len(self)), look):
            sizes[row] = found
        return Survey(sizes, tuple(np.flatnonzero(sizes[:, 0] == 0).tolist()))

    def _each(self, rows: Tensor, work: Callable[[str, Item], T]) -> Iterator[tuple[int, T]]:
        def run(piece: list[tuple[int, str, Item]]) -> list[tuple[int, T]]:
            return [(position, work(name, item)) for position, name, item in piece]

        items = self.items(rows)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            while window := list(islice(items, _WINDOW)):
                pieces = [window[start : start + _PIECE] for start in range(0, len(window), _PIECE)]
                for done in pool.map(run, pieces):
                    yield from done


class Files(Encoded):
    """Files below ``root``; the names are one byte string, so a million files cost some tens of MB."""

    kind = "files"

    def __init__(self, root: Path, names: Sequence[bytes]) -> None:
        self.root = root
        self._blob = b"".join(names)
        self._ends = np.fromiter(accumulate(map(len, names), initial=0), np.int64, len(names) + 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def relative(self, row: int) -> bytes:
        """The file's name below the root, parts joined by ``/``."""
        return self._blob[self._ends[row] : self._ends[row + 1]]

    def name(self, row: int) -> str:
        return str(self.root / os.fsdecode(self.relative(row)))

    def items(self, rows: Tensor) -> Iterator[tuple[int, str, Item]]:
        for position, row in enumerate(rows.numpy()):
            name = self.name(row)
            yield position, name, Path(name)

    def hashes(self, rows: Tensor) -> NDArray[np.uint8]:
        found = super().hashes(rows)
        for position, row in enumerate(rows.numpy()):
            found[position] = _sha256(self.relative(row) + b"\0" + found[position].tobytes())
        return found


class Shards(Encoded):
    """Rows of parquet files whose picture column is ``struct{bytes, path}``; read one row group at a time."""

    kind = "encoded"

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self._column = column
        self._groups: list[tuple[Path, int]] = []
        self._first: list[int] = []  # per group, the row where its file begins
        counts = [0]
        for path in paths:
            footer = pq.read_metadata(path)
            self._first += [sum(counts)] * footer.num_row_groups
            self._groups += [(path, group) for group in range(footer.num_row_groups)]
            counts += [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._starts = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"row {row - self._first[group]} of {self._groups[group][0]}"

    def group(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(np.searchsorted(self._starts, rows.numpy(), side="right") - 1)

    def items(self, rows: Tensor) -> Iterator[tuple[int, str, Item]]:
        order = torch.argsort(rows, stable=True)
        groups, starts = np.unique(self.group(rows[order]).numpy(), return_index=True)
        for group, positions in zip(
            groups.tolist(), torch.tensor_split(order, starts[1:].tolist()), strict=True
        ):
            local = rows[positions].numpy() - self._starts[group]
            for index, item in self._bytes(group, local):
                position = int(positions[index])
                yield position, self.name(int(rows[position])), item

    def _bytes(self, group: int, local: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        """Yield (index in ``local``, bytes) for the ascending rows ``local`` of one row group."""
        path, number = self._groups[group]
        done, offset = 0, 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(
                    _WINDOW, row_groups=[number], columns=[f"{self._column}.bytes"], use_threads=False
                ):
                    column = batch.column(0).field("bytes")
                    while done < len(local) and local[done] < offset + len(column):
                        yield done, column[int(local[done]) - offset].as_py() or b""
                        done += 1
                    offset += len(column)
                    if done == len(local):
                        return
        except (pa.ArrowException, OSError) as error:
            raise ImageError(
                f"{path} cannot be read as parquet ({error}); repair or replace the file."
            ) from error


def _sha256(data: bytes | memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
