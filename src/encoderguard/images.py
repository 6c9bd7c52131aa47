"""``ImageSet``: every source of pictures as one type that hands out uint8 tensors and has a digest."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.image_named import Source, label_tensor
from encoderguard.image_sources import open_source
from encoderguard.image_storage import Arrays, Files
from encoderguard.image_view import View, by, common_size
from encoderguard.random import Rng

__all__ = ["ImageSet", "load_images"]

FULL_CHECK_LIMIT = 10_000
"""Folders of up to this many pictures are decoded once at load, so that a broken file is named early."""


@final
class ImageSet:
    """Pictures of one size, in a fixed order, with or without labels. Made by ``load_images``.

    Attributes:
        spec: The text the set was opened from; a part of a set keeps the text of the whole.
        name: A short name for messages and reports.
        labels: int64 ``[N]`` from 0 on, or None where labels are not held or were not asked for.
        classes: Class names by label; empty where unknown.
        skipped: Names of unreadable pictures that were left out.
        canvases: uint8 ``[M, 3, H', W']``, or None: further pictures of another size that a pair poisoner
            appended. Only pre-training looks at them, cropping its views from them; they count in the digest.
        captions: One text per picture, or None; they count in the digest.
    """

    def __init__(
        self,
        view: View,
        positions: Tensor,
        *,
        spec: str,
        name: str,
        labels: Tensor | None,
        classes: tuple[str, ...],
        skipped: tuple[str, ...] = (),
        canvases: Tensor | None = None,
        captions: tuple[str, ...] | None = None,
    ) -> None:
        self.canvases, self.captions = canvases, captions
        self.spec, self.name, self.classes, self.skipped = spec, name, classes, skipped
        self.labels = labels
        self._view, self._positions = view, positions

    @classmethod
    def from_arrays(
        cls,
        images: Tensor | NDArray[np.uint8],
        labels: Tensor | NDArray[Any] | Sequence[int] | None = None,
        classes: Sequence[str] = (),
        *,
        name: str = "arrays",
        canvases: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> "ImageSet":
        """A set over uint8 ``[N, 3, H, W]`` in 0..255; the memory is shared, do not write to it later.

        Raises:
            ImageError: wrong shape or type, no images, or labels or captions that do not fit them.
        """
        found = (tuple(images.shape), str(images.dtype).removeprefix("torch."))
        if len(found[0]) != 4 or found[0][1] != 3 or 0 in found[0] or found[1] != "uint8":
            raise ImageError(
                "Expected uint8 images of shape (N, 3, H, W) with N, H, W of at least 1, "
                f"found shape {found[0]} and type {found[1]}."
            )
        if isinstance(images, Tensor):
            pixels = images.detach().cpu()
        else:  # torch wants writable memory without negative strides
            pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        names = tuple(classes)
        held = None if labels is None else label_tensor(labels, len(pixels), names, f"Labels of {name}")
        texts = None if captions is None else tuple(captions)
        if texts is not None and len(texts) != len(pixels):
            raise ImageError(f"Expected one caption for each of {len(pixels)} images, found {len(texts)}.")
        source = Source(Arrays(pixels), name, held, names, canvases, texts)
        return _admit(source, f"arrays:{name}", None, False)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images of {by(self.shape)}, {len(self.classes)} classes)"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels, after sizing."""
        return self._view.shape

    @cached_property
    def digest(self) -> str:
        """The sha256 of the content in order: pixels or encoded bytes, folder names, labels; not the sizing.

        Read once, one window at a time; the whole as a part of itself has the same digest.
        """
        view = self._view
        head: dict[str, object] = {"kind": view.storage.kind, "count": len(self)}
        if isinstance(view.storage, Arrays):
            head["shape"] = list(view.storage.pixels.shape[1:])
        total = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        total.update(view.storage.hashes(view.rows[self._positions]).tobytes())
        if self.labels is not None:
            total.update(self.labels.numpy().astype("<i8").tobytes())
        if self.canvases is not None:
            total.update(str(list(self.canvases.shape)).encode() + self.canvases.numpy().tobytes())
        if self.captions is not None:
            total.update(json.dumps(self.captions).encode())
        return total.hexdigest()

    def take(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images at ``indices`` as a new uint8 tensor ``[n, 3, H, W]``, 0..255, on the CPU.

        Raises:
            ImageError: an index is out of range, or a picture cannot be read (its file is named).
        """
        return self._view.take(self._positions[self._checked(indices)])

    def float_batches(
        self, batch_size: int, *, indices: Sequence[int] | Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield float32 ``[n, 3, H, W]`` in [0, 1], in order, n being ``batch_size`` or less at the end.

        Raises:
            ImageError: as for ``take``; also a batch size below 1.
        """
        if batch_size < 1:
            raise ImageError(f"Expected a batch size of at least 1, found {batch_size}.")
        chosen = torch.arange(len(self)) if indices is None else self._checked(indices)
        starts = range(0, len(chosen), batch_size)
        return (self.take(chosen[start : start + batch_size]).float().div_(255) for start in starts)

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageSet":
        """The images at ``indices``, in that order, without reading them; its digest is over its content.

        Raises:
            ImageError: an index is out of range, or there is none.
        """
        if self.canvases is not None:
            raise ImageError(
                f"{self.name} is a poisoned set with {len(self.canvases)} appended canvases; "
                "use it whole (without --count), or draw from the clean set."
            )
        chosen = self._checked(indices)
        if not len(chosen):
            raise ImageError(f"A part of {self.name} needs at least one image, found none chosen.")
        view, positions = self._view, self._positions[chosen]
        # What is already decoded is shared; otherwise the part keeps its own pixels and not the whole's.
        if not view.complete:
            view = View(view.storage, view.rows[positions], view.shape, view.size)
            positions = torch.arange(len(chosen))
        labels = None if self.labels is None else self.labels[chosen]
        texts = None if self.captions is None else tuple(self.captions[k] for k in chosen.tolist())
        same: dict[str, Any] = {"spec": self.spec, "name": self.name, "classes": self.classes}
        return ImageSet(view, positions, labels=labels, captions=texts, **same)

    def sample(self, n: int, rng: Rng) -> "ImageSet":
        """``n`` images drawn without replacement, in random order; the same ``rng`` draws the same.

        Raises:
            ImageError: fewer than ``n`` images are there, or ``n`` is below 1.
        """
        if not 1 <= n <= len(self):
            raise ImageError(
                f"Expected to draw 1 to {len(self)} images, all that {self.name} has; asked for {n}."
            )
        return self.subset(rng.permutation(len(self), "sample")[:n])

    def _checked(self, indices: Sequence[int] | Tensor) -> Tensor:
        found = torch.as_tensor(indices, device="cpu") if len(indices) else torch.empty(0, dtype=torch.int64)
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise ImageError(
                f"Expected a row of integer indices, found {found.dtype} of {tuple(found.shape)}."
            )
        if len(found) and (int(found.min()) < 0 or int(found.max()) >= len(self)):
            raise ImageError(
                f"{self.name} has {len(self)} images, expected indices from 0 to {len(self) - 1}, "
                f"found {int(found.min())} to {int(found.max())}."
            )
        return found.long()


def load_images(
    spec: str,
    *,
    size: int | None = None,
    data_root: Path | None = None,
    download: bool = False,
    labels: bool = False,
    skip_unreadable: bool = False,
) -> ImageSet:
    """Open the pictures that one spec names.

    A spec is one of

    - a folder of pictures, nested or not, of any size and mode: hidden files and files without an image
      suffix are ignored, every other must be readable; labels are the names of the top-level folders;
    - an ``.npz`` file with ``images`` or ``x``, uint8 ``[N, H, W, 3]``, and perhaps ``labels`` or ``y``,
      ``canvases`` (uint8 ``[M, H', W', 3]``), ``captions`` (text ``[N]``) and ``classes`` (text);
    - a ``.parquet`` file with a column ``image`` (struct of bytes and path) and perhaps ``label``, or a
      folder of them; ``folder:train`` (or ``#train``) takes the files whose names before ``-`` are ``train``;
    - ``cifar10:train``, ``cifar100:test``, ``gtsrb:train``, ``svhn:test``, ``stl10:unlabeled`` and so on: a
      data set of torchvision below ``data_root``;
    - ``digits:train``, ``digits:test``, or ``digits`` for the former: the digits of scikit-learn, 32x32.

    A text that contains a separator or a suffix and exists is always that path; any other is first compared
    with the names, so the folder ``cifar10`` beside you is written ``./cifar10``.

    Args:
        spec: What to open.
        size: Side in pixels: the shorter side is resized to it (bilinear, antialiased), then the centre is
            cut out. None keeps the native size, which all pictures must then share.
        data_root: Where torchvision keeps its data; ``~/.cache/encoderguard/data`` if None.
        download: Let torchvision download what is missing.
        labels: Load the labels too, and fail where there are none; without it a set never carries labels.
        skip_unreadable: Decode everything once now, leave out what fails and list it in ``skipped``.

    Raises:
        ImageError: nothing is found, a file is broken, sizes differ, or labels are asked for and not there.
    """
    if size is not None and size < 2:
        raise ImageError(f"Expected an image size of at least 2 pixels, found {size}.")
    source = open_source(spec, data_root=data_root, download=download, labels=labels)
    if labels and source.labels is None:
        raise ImageError(f"{spec} holds no labels; give a set with labels.")
    return _admit(source, spec, size, skip_unreadable)


def _admit(source: Source, spec: str, size: int | None, skip: bool) -> ImageSet:
    """Check the pictures as far as asked, leave out unreadable ones, settle the common size."""
    storage, rows, skipped = source.storage, torch.arange(len(source.storage)), tuple[str, ...]()
    full = skip or (isinstance(storage, Files) and len(storage) <= FULL_CHECK_LIMIT)
    shape = (size, size) if size is not None else None
    if len(rows) and (full or shape is None):
        survey = storage.survey(full=full, skip=skip)
        skipped = tuple(storage.name(row) for row in survey.bad)
        rows = rows[torch.from_numpy(survey.sizes[:, 0] > 0)]
        if shape is None and len(rows):
            shape = common_size(storage, rows, survey.sizes)
    if not len(rows) or shape is None:
        reason = f"none of its {len(skipped)} pictures can be read" if skipped else "it is empty"
        raise ImageError(f"{spec} holds no usable pictures: {reason}; give another set.")
    return ImageSet(
        View(storage, rows, shape, size),
        torch.arange(len(rows)),
        spec=spec,
        name=source.name,
        labels=None if source.labels is None else source.labels[rows],
        classes=source.classes,
        skipped=skipped,
        canvases=source.canvases,
        captions=None if source.captions is None else tuple(source.captions[row] for row in rows.tolist()),
    )
