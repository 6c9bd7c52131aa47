"""Triggers: small serialisable objects that stamp float image batches in [0, 1].

A trigger never normalises: pixels in, pixels out, same shape, same range. The reader for the field's ``.npz``
trigger files keeps their convention in one place: there the mask is 1 where the *image* is kept.
"""

import json
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from encoderguard.errors import ImageError
from encoderguard.storage import write_text

__all__ = ["MaskedPattern", "Patch", "Trigger", "load_trigger", "read_field_trigger", "save_trigger"]


class Trigger(ABC):
    """Stamps ``[N, 3, H, W]`` images in [0, 1]; the result has the same shape and range."""

    @abstractmethod
    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The stamped images; the input is unchanged.

        Args:
            images: ``[N, 3, H, W]`` in [0, 1].
            generator: on the CPU, for triggers that draw (places, noise); None takes one from the trigger's
                own seed, so that the same call gives the same result.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON description from which ``load_trigger`` makes an equal trigger."""


class _PatchModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["patch"] = "patch"
    size: Annotated[int, Field(ge=1)]
    margin: Annotated[int, Field(ge=0)]
    value: Annotated[float, Field(ge=0, le=1)]


@final
@dataclass(frozen=True, kw_only=True)
class Patch(Trigger):
    """A square of one brightness in the lower right corner (BadEncoder: white, 10 px, margin 1 at 32 px).

    With the defaults rows and columns 21-30 of a 32 x 32 image are replaced, as in the field's own trigger
    file.
    """

    size: int = 10
    margin: int = 1
    value: float = 1.0

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Stamp. Raises ImageError if the patch does not fit."""
        height, width = images.shape[-2:]
        top, left = height - self.margin - self.size, width - self.margin - self.size
        if min(top, left) < 0:
            raise ImageError(
                f"A {self.size}-pixel patch with margin {self.margin} does not fit "
                f"into {height} x {width} images."
            )
        stamped = images.clone()
        stamped[..., top : top + self.size, left : left + self.size] = self.value
        return stamped

    def to_dict(self) -> dict[str, Any]:
        """See Trigger."""
        return {"kind": "patch", "size": self.size, "margin": self.margin, "value": self.value}


class _MaskedModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["masked_pattern"] = "masked_pattern"
    mask: list[list[Annotated[float, Field(ge=0, le=1)]]]
    pattern: list[list[list[Annotated[float, Field(ge=0, le=1)]]]]


@final
@dataclass(frozen=True, eq=False)
class MaskedPattern(Trigger):
    """``(1 - m) x + m t``: the mask ``m`` is 1 where the pattern ``t`` *replaces* the image."""

    mask: Tensor
    """``[H, W]`` in [0, 1]."""
    pattern: Tensor
    """``[3, H, W]`` in [0, 1]."""

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Stamp. Raises ImageError if the trigger was made for another image size."""
        if images.shape[-2:] != self.mask.shape:
            raise ImageError(
                f"This trigger is for {list(self.mask.shape)} images, these are {list(images.shape[-2:])}; "
                "pass images of the trigger's size."
            )
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return (1 - mask) * images + mask * pattern

    def to_dict(self) -> dict[str, Any]:
        """See Trigger. Values are rounded to 6 digits."""
        return {
            "kind": "masked_pattern",
            "mask": np.round(self.mask.double().numpy(), 6).tolist(),
            "pattern": np.round(self.pattern.double().numpy(), 6).tolist(),
        }


_ADAPTER: TypeAdapter[_PatchModel | _MaskedModel] = TypeAdapter(
    Annotated[_PatchModel | _MaskedModel, Field(discriminator="kind")]
)


def save_trigger(trigger: Trigger, path: Path) -> Path:
    """Write ``trigger.json`` atomically."""
    return write_text(path, json.dumps(trigger.to_dict()) + "\n")


def load_trigger(path: Path) -> Trigger:
    """Read a ``trigger.json`` or one of the field's ``.npz`` trigger files.

    Raises:
        ImageError: the file is missing or is not a trigger.
    """
    if not path.is_file():
        raise ImageError(f"There is no trigger file {path}.")
    if path.suffix == ".npz":
        return read_field_trigger(path)
    try:
        model = _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ImageError(f"{path} is not a trigger file: {first['msg']} at {first['loc']}.") from None
    if isinstance(model, _PatchModel):
        return Patch(size=model.size, margin=model.margin, value=model.value)
    return MaskedPattern(torch.tensor(model.mask), torch.tensor(model.pattern))


def read_field_trigger(path: Path) -> MaskedPattern:
    """The BadEncoder family's npz: ``t`` in 0..255 and ``tm`` (1 keeps the image).

    Both are ``[1, H, W, 3]`` or ``[H, W, 3]``.

    Raises:
        ImageError: keys or shapes are others.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            pattern, keep = data["t"], data["tm"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{path} is not a trigger file with the arrays 't' and 'tm': {error}.") from None
    pattern, keep = (a[0] if a.ndim == 4 else a for a in (pattern, keep))
    if pattern.shape != keep.shape or pattern.ndim != 3 or pattern.shape[-1] != 3:
        raise ImageError(
            f"{path}: expected 't' and 'tm' of shape [1, H, W, 3], found {pattern.shape}, {keep.shape}."
        )
    if (keep != keep[..., :1]).any():
        raise ImageError(f"{path}: the mask 'tm' differs between colour channels, which is not supported.")
    mask = 1 - torch.from_numpy(np.asarray(keep[..., 0], dtype=np.float32))
    colours = torch.from_numpy(np.asarray(pattern, dtype=np.float32)).permute(2, 0, 1) / 255
    return MaskedPattern(mask, colours * mask)
