"""Arrays as small PNG pictures whose pixels stay square and sharp."""

import base64
import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "Pixels",
    "data_uri",
    "embedding",
    "field_of",
    "heat",
    "pictures",
    "png",
    "stacked",
    "trigger_on_grey",
]

Pixels = NDArray[np.uint8]
_LEAST_SIDE = 192


def _as_uint8(array: NDArray[np.generic]) -> Pixels:
    if array.dtype == np.uint8:
        return array.astype(np.uint8)
    values = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    pixels: Pixels = np.clip(values * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _numeric(arrays: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.generic] | None:
    array = arrays.get(name)
    return None if array is None or array.dtype.kind not in "uif" or array.size == 0 else array


def pictures(arrays: Mapping[str, NDArray[np.generic]], name: str, most: int = 8) -> list[Pixels]:
    """Up to ``most`` uint8 ``[H, W, 3]`` pictures of an array ``[N, H, W, 3|1]`` or ``[H, W, 3|1]``."""
    array = _numeric(arrays, name)
    if array is None:
        return []
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        return []
    return [np.broadcast_to(_as_uint8(image), (*image.shape[:2], 3)) for image in batch[:most]]


def field_of(arrays: Mapping[str, NDArray[np.generic]], name: str, ndim: int) -> NDArray[np.float64] | None:
    """A float array of ``ndim`` axes (``[H, W]`` mask, ``[H, W, 3]`` pattern), or None."""
    array = _numeric(arrays, name)
    if array is None or array.ndim != ndim or (ndim == 3 and array.shape[-1] != 3):
        return None
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return np.clip(np.nan_to_num(array.astype(np.float64)) / scale, 0.0, 1.0)


def embedding(arrays: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float64] | None:
    """The finite rows of an ``[n, 2]`` array, or None."""
    array = _numeric(arrays, name)
    if array is None or array.ndim != 2 or array.shape[1] != 2:
        return None
    rows: NDArray[np.float64] = array.astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    return rows if len(rows) else None


def heat(mask: NDArray[np.float64]) -> Pixels:
    """A mask ``[H, W]`` in [0, 1] as colours: black is 0, pale yellow is 1."""
    return _as_uint8(matplotlib.colormaps["magma"](mask)[..., :3])


def trigger_on_grey(mask: NDArray[np.float64], pattern: NDArray[np.float64]) -> Pixels | None:
    """What the trigger does to a mid-grey image; None if the two do not fit together."""
    if mask.shape != pattern.shape[:2]:
        return None
    return _as_uint8(mask[..., None] * pattern + (1 - mask[..., None]) * 0.5)


def stacked(top: Pixels, bottom: Pixels) -> Pixels:
    """Two pictures of one size above each other with a thin white line between them."""
    if top.shape != bottom.shape:
        return bottom
    gap = np.full((max(1, top.shape[0] // 24), top.shape[1], 3), 255, np.uint8)
    return np.concatenate([top, gap, bottom])


def png(image: Pixels) -> bytes:
    """PNG bytes; a small picture is enlarged by whole pixels, so no viewer blurs it."""
    factor = max(1, -(-_LEAST_SIDE // image.shape[1]))
    enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
    stream = io.BytesIO()
    Image.fromarray(enlarged).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """``content`` as a ``data:`` address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
