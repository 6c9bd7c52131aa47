"""One encoded picture -> uint8 RGB pixels, and pixels -> the size asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from encoderguard.errors import ImageError

__all__ = ["SUFFIXES", "Item", "decode", "fit", "header_size", "is_picture_name", "naming"]

_NAMES = "png jpg jpeg jpe jfif webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())

Item = bytes | Path
"""An encoded picture: its bytes, or the file that holds them."""


def is_picture_name(name: bytes) -> bool:
    """Whether a file counts as a picture: an image suffix, and not hidden."""
    return (
        not name.startswith(b".") and os.path.splitext(name)[1].lower().decode("ascii", "replace") in SUFFIXES
    )


def decode(item: Item, name: str) -> Tensor:
    """Decode one picture to uint8 RGB ``[3, H, W]``, as stored (transparency and EXIF rotation are ignored).

    Grey and palette pictures become RGB; of 16-bit values the high byte is kept; the first frame counts.

    Raises:
        ImageError: the picture is missing, truncated, or of a kind without a fixed 8-bit meaning.
    """
    with naming(name), _open(item) as picture:
        picture.load()
        pixels = np.array(_rgb(picture))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def header_size(item: Item, name: str) -> tuple[int, int]:
    """Height and width from the picture's header alone; the pixels are not decoded.

    Raises:
        ImageError: the picture is missing or its header cannot be read.
    """
    with naming(name), _open(item) as picture:
        return picture.height, picture.width


def fit(images: Tensor, size: int | None) -> Tensor:
    """Bring uint8 ``[..., H, W]`` to ``size x size``: shorter side bilinear, antialiased; centre crop."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    resized: Tensor = resize(images, [size], antialias=True)
    cropped: Tensor = center_crop(resized, [size, size])
    return cropped


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn whatever is raised on a broken picture (Pillow's readers raise many kinds) into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known picture format, or cut off in its header"
        elif isinstance(error, FileNotFoundError):
            reason = "the file is gone"
        raise ImageError(
            f"{name} cannot be read as a picture ({reason}); "
            "repair or remove it, or drop unreadable pictures with --skip-unreadable."
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    # A closed list: some other readers of Pillow (EPS) start an external program on the file.
    Image.init()
    wanted = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def _open(item: Item) -> Image.Image:
    if item == b"":
        raise ValueError("no picture bytes are stored here")
    return Image.open(BytesIO(item) if isinstance(item, bytes) else item, formats=_formats())


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, expected 8 or 16 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels need 32 bits, expected 8 or 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in picture.info:  # Pillow warns when such a palette goes to RGB directly
        picture = picture.convert("RGBA")
    return picture.convert("RGB")
