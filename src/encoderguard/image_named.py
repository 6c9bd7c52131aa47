"""Pictures by name: the data sets of torchvision, and the digits that scikit-learn carries."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.image_storage import Arrays, Files, Storage
from encoderguard.random import Rng

__all__ = ["DEFAULT_DATA_ROOT", "NAMED", "Source", "digits_set", "label_tensor", "torchvision_set"]

DEFAULT_DATA_ROOT = Path.home() / ".cache" / "encoderguard" / "data"

NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", ("train", "test")),
    "cifar100": ("CIFAR100", ("train", "test")),
    "gtsrb": ("GTSRB", ("train", "test")),
    "svhn": ("SVHN", ("train", "test")),
    "stl10": ("STL10", ("train", "test", "unlabeled")),
}
"""Data sets of torchvision: class name and splits."""


@dataclass(frozen=True)
class Source:
    """What a spec opens to: ``labels`` is int64 ``[N]``, or None where none are held or asked for."""

    storage: Storage
    name: str
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    canvases: Tensor | None = None
    captions: tuple[str, ...] | None = None


def label_tensor(values: Any, count: int, classes: Sequence[str], where: str) -> Tensor:
    """Check labels and return them as int64 ``[count]``.

    Raises:
        ImageError: not ``count`` integers from 0 on, or one has no class name.
    """
    found = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise ImageError(
            f"{where}: expected {count} integer labels, found shape {found.shape} and type {found.dtype}."
        )
    low, high = (int(found.min()), int(found.max())) if count else (0, 0)
    if low < 0:
        raise ImageError(f"{where}: label {low} marks an unlabelled image; use this set without labels.")
    if classes and high >= len(classes):
        raise ImageError(f"{where}: label {high} has no name, there are {len(classes)} class names.")
    return torch.from_numpy(found.astype(np.int64))


def torchvision_set(base: str, split: str, root: Path, download: bool, labels: bool) -> Source:
    """Open a data set of torchvision by its key in ``NAMED``.

    Raises:
        ImageError: unknown split, or not found under ``root``.
    """
    import torchvision

    class_name, splits = NAMED[base]
    if split not in splits:
        choices = ", ".join(f"{base}:{one}" for one in splits)
        raise ImageError(f"{base} needs a split: choose one of {choices} (for a folder write ./{base}).")
    chosen = {"train": split == "train"} if base.startswith("cifar") else {"split": split}
    try:
        held = getattr(torchvision.datasets, class_name)(str(root), download=download, **chosen)
    except (RuntimeError, OSError) as error:
        advice = "check the network" if download else "name the right folder, or add --download"
        raise ImageError(
            f"{base}:{split} was not found under --data-root {root} ({str(error).split('. ')[0]}); {advice}."
        ) from error
    classes = tuple(map(str, getattr(held, "classes", ())))
    if hasattr(held, "data"):
        pixels = torch.from_numpy(np.asarray(held.data))
        storage: Storage = Arrays(pixels.permute(0, 3, 1, 2) if base.startswith("cifar") else pixels)
        numbers = held.targets if base.startswith("cifar") else held.labels
    else:  # GTSRB keeps (file, label) pairs and opens files on demand, as we do
        paths, numbers = zip(*held._samples, strict=True)
        storage = Files(root, [os.fsencode(os.path.relpath(path, root)) for path in paths])
    found = label_tensor(numbers, len(storage), classes, f"{base}:{split}") if labels else None
    return Source(storage, f"{base}:{split}", found, classes if labels else ())


def digits_set(split: str, labels: bool) -> Source:
    """Open 1,200 (train) or 597 (test) of the 1,797 8x8 digits of scikit-learn, as 32x32 RGB.

    The split is stratified and always the same; an empty ``split`` means train.

    Raises:
        ImageError: unknown split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("", "train", "test"):
        raise ImageError(f"digits has no split {split!r}; choose digits:train or digits:test.")
    held = load_digits()
    parts = train_test_split(
        np.arange(len(held.target)),
        train_size=1200,
        stratify=held.target,
        random_state=Rng(0).integer("digits") % 2**32,
    )
    rows = np.sort(parts[split == "test"])
    grey = torch.from_numpy(held.images[rows]).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
    name = f"digits:{split or 'train'}"
    if not labels:
        return Source(Arrays(pixels), name)
    return Source(Arrays(pixels), name, torch.from_numpy(held.target[rows]).long(), tuple("0123456789"))
