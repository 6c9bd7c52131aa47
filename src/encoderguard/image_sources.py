"""Spec string -> pictures, labels and class names. The rules are in the docstring of ``load_images``."""

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.image_decoding import is_picture_name
from encoderguard.image_named import (
    DEFAULT_DATA_ROOT,
    NAMED,
    Source,
    digits_set,
    label_tensor,
    torchvision_set,
)
from encoderguard.image_storage import Arrays, Files, Shards

__all__ = ["MEMORY_BUDGET", "open_source"]

MEMORY_BUDGET = 2 * 1024**3
"""Bytes of decoded pixels that one set may keep in memory."""


def open_source(spec: str, *, data_root: Path | None, download: bool, labels: bool) -> Source:
    """Open the pictures that ``spec`` names, without decoding them.

    Raises:
        ImageError: nothing, or nothing usable, is found there.
    """
    base, split = _divide(spec)
    if base == "digits":
        return digits_set(split, labels)
    if base in NAMED:
        return torchvision_set(base, split, data_root or DEFAULT_DATA_ROOT, download, labels)
    path = Path(base)
    try:
        there = bool(base) and path.exists()
    except OSError as error:
        raise ImageError(f"{base[:80]}... cannot be used: {error.strerror}; give another path.") from None
    if not there:
        raise ImageError(
            f"No pictures at {base!r}: expected a folder, an .npz or .parquet file, "
            f"or one of {', '.join(['digits', *NAMED])} with a split such as :train."
        )
    if path.is_dir() and (shards := sorted(path.glob("*.parquet"))):
        return _parquet(path, shards, split, labels)
    if split:
        raise ImageError(
            f"{base} has no split {split!r}: only a folder of parquet files has splits; "
            "give the path of the pictures themselves."
        )
    if path.is_dir():
        return _folder(path, labels)
    if path.suffix.lower() == ".npz":
        return _npz(path, labels)
    if path.suffix.lower() == ".parquet":
        return _parquet(path, [path], "", labels)
    raise ImageError(f"{path} is neither a folder nor an .npz or .parquet file; give one of these.")


def _divide(spec: str) -> tuple[str, str]:
    """Split a spec into (path or name, split or '')."""
    looks_like_path = "/" in spec or os.sep in spec or bool(Path(spec).suffix)
    if looks_like_path and Path(spec).exists():
        return spec, ""
    found = re.fullmatch(r"(.+)[:#]([\w.+]+)", spec)
    return (found[1], found[2]) if found else (spec, "")


def _folder(root: Path, labels: bool) -> Source:
    try:
        names = list(_scan(os.fsencode(root), b"", ()))
    except OSError as error:
        raise ImageError(f"The folder {root} cannot be listed ({error}); check its permissions.") from error
    if not names:
        raise ImageError(
            f"The folder {root} holds no pictures (files such as .png or .jpg); give another one."
        )
    storage = Files(root, names)
    if not labels:
        return Source(storage, root.resolve().name)
    tops = [name.partition(b"/")[0] for name in names]
    if loose := next((name for name in names if b"/" not in name), None):
        raise ImageError(
            f"{root / os.fsdecode(loose)} lies in no class folder; for labels every picture must."
        )
    order = {top: number for number, top in enumerate(sorted(set(tops)))}
    numbers = torch.tensor([order[top] for top in tops])
    return Source(storage, root.resolve().name, numbers, tuple(map(os.fsdecode, order)))


def _scan(root: bytes, below: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
    """Names of pictures below a folder, in bytewise order of their parts; hidden ones are ignored."""
    here = os.stat(os.path.join(root, below))
    if (here.st_dev, here.st_ino) in above:  # a link to a folder above would never end
        return
    with os.scandir(os.path.join(root, below)) as entries:
        found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith(b"."))
    for name, is_folder in found:
        path = below + b"/" + name if below else name
        if is_folder:
            yield from _scan(root, path, (*above, (here.st_dev, here.st_ino)))
        elif is_picture_name(name):
            yield path


def _npz(path: Path, labels: bool) -> Source:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            if not isinstance(held, np.lib.npyio.NpzFile):
                raise ImageError(f"{path} holds one bare array, expected an .npz with `images` or `x`.")
            keys = [
                next((key for key in pair if key in held), "") for pair in (("images", "x"), ("labels", "y"))
            ]
            if not keys[0]:
                raise ImageError(f"{path} holds {', '.join(held.files)}; expected an array `images` or `x`.")
            images = _map_stored(path, keys[0])
            if images is None:
                images = held[keys[0]]
            numbers = held[keys[1]] if labels and keys[1] else None
            further = {key: held[key] for key in ("canvases", "captions", "classes") if key in held}
    except ImageError:
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds on a broken file
        raise ImageError(
            f"{path} cannot be read as plain arrays ({error}); "
            "files with pickled objects are refused, save numeric arrays with numpy.savez."
        ) from error
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ImageError(
            f"{path}: expected `{keys[0]}` of shape (N, H, W, 3) and type uint8, "
            f"found {images.shape} and {images.dtype}."
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    canvases, captions, classes = _further(path, len(images), further)
    held_labels = (
        None if numbers is None else label_tensor(numbers, len(images), classes, f"`{keys[1]}` of {path}")
    )
    return Source(Arrays(pixels), path.stem, held_labels, classes if labels else (), canvases, captions)


def _further(
    path: Path, count: int, held: dict[str, NDArray[Any]]
) -> tuple[Tensor | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Canvases ``[M, 3, H', W']``, captions and class names of a file that may hold them."""
    wide, texts, names = held.get("canvases"), held.get("captions"), held.get("classes")
    if wide is not None and (wide.ndim != 4 or wide.shape[3] != 3 or wide.dtype != np.uint8):
        raise ImageError(
            f"{path}: expected `canvases` of shape (M, H, W, 3) and type uint8, "
            f"found {wide.shape} and {wide.dtype}."
        )
    if texts is not None and (texts.shape != (count,) or texts.dtype.kind != "U"):
        raise ImageError(
            f"{path}: expected `captions` of {count} texts, found {texts.shape} and {texts.dtype}."
        )
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ImageError(f"{path}: expected `classes` as a row of texts, found {names.shape}, {names.dtype}.")
    canvases = None if wide is None else torch.from_numpy(wide).permute(0, 3, 1, 2).contiguous()
    captions = None if texts is None else tuple(texts.tolist())
    return canvases, captions, () if names is None else tuple(names.tolist())


def _map_stored(path: Path, key: str) -> NDArray[Any] | None:
    """Memory-map an uncompressed array that is over the memory budget; None for every other."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size <= MEMORY_BUDGET:
        return None
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # the zip entry's own header: two lengths, then name and extra
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"`{key}` holds pickled objects")
        # Copy on write: torch wants writable memory, the file must stay as it is.
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")


def _parquet(path: Path, files: Sequence[Path], split: str, labels: bool) -> Source:
    name = path.resolve().name if path.is_dir() else path.stem
    if path.is_dir():
        splits = sorted({file.stem.split("-")[0] for file in files})
        if split not in splits and (split or len(splits) > 1):
            wanted = f"no split {split!r}" if split else "several splits"
            choices = ", ".join(f"{path}:{one}" for one in splits)
            raise ImageError(f"The folder {path} has {wanted}; choose one of {choices}.")
        split = split or splits[0]
        files = [file for file in files if file.stem.split("-")[0] == split]
        name = f"{name}:{split}"
    try:
        schema = pq.read_schema(files[0])
        image, label = _column(schema, "image", "img"), _column(schema, "label", "labels", "fine_label")
        if not image or not pa.types.is_struct(schema.field(image).type) or _no_bytes(schema, image):
            raise ImageError(
                f"{files[0]}: expected a column `image` of struct{{bytes, path}}, found "
                f"{', '.join(f'{field.name}: {field.type}' for field in schema)}."
            )
        storage = Shards(files, image)
        if not labels or not label:
            return Source(storage, name)
        numbers = np.concatenate([pq.read_table(f, columns=[label])[label].to_numpy() for f in files])
    except (pa.ArrowException, OSError) as error:
        raise ImageError(
            f"{path} cannot be read as parquet ({error}); repair or replace the file."
        ) from error
    classes = _class_names(schema, label)
    return Source(
        storage, name, label_tensor(numbers, len(storage), classes, f"`{label}` of {path}"), classes
    )


def _column(schema: pa.Schema, *names: str) -> str:
    return next((name for name in names if name in schema.names), "")


def _no_bytes(schema: pa.Schema, image: str) -> bool:
    return bool(schema.field(image).type.get_field_index("bytes") < 0)


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    try:
        held = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, held["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
