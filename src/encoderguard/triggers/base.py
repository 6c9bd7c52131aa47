"""What all triggers share: the call, the checks of settings, the JSON form and the register of kinds."""

import dataclasses
import json
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import torch
from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError
from torch import Tensor

from encoderguard.errors import ImageError, SettingError

__all__ = [
    "Additions",
    "Colours",
    "Count",
    "Flag",
    "Index",
    "Mask",
    "Share",
    "Trigger",
    "Weight",
    "reason",
    "stamp_uint8",
    "trigger_class",
    "trigger_kind",
]

_ALWAYS_TOLD = frozenset({"alpha", "magnitude", "size", "strength"})
_KINDS: dict[str, type["Trigger"]] = {}


class Trigger(ABC):
    """Stamps ``[N, 3, H, W]`` images in [0, 1]; shape, range, dtype and device stay, the input is unchanged.

    A kind of trigger is a frozen dataclass with a ``kind`` and ``_stamp``. Its fields are its settings: they
    are checked against their annotations when it is made, and they are what its JSON form holds. Two triggers
    are equal when their JSON forms are.
    """

    kind: ClassVar[str]
    """Names the class in JSON and on the command line."""

    def __post_init__(self) -> None:
        """Check every setting against its annotation. Raises SettingError."""
        for name, adapter in _adapters(type(self)).items():
            try:
                object.__setattr__(self, name, adapter.validate_python(getattr(self, name)))
            except ValidationError as error:
                raise SettingError(
                    f"'{name}' of a {self.kind} trigger is not valid: {reason(error)}."
                ) from None

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The stamped images; the input is unchanged.

        Args:
            images: float ``[N, 3, H, W]`` in [0, 1].
            generator: on the CPU, for triggers that draw (places, noise). They draw image by image: batches
                stamped one after the other equal one large batch. None takes a new one from the trigger's own
                seed, so that the same call gives the same result.

        Raises:
            ImageError: the images have another type or shape, or the trigger does not fit them.
        """
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                "A trigger stamps float images [N, 3, H, W] in [0, 1], "
                f"found {images.dtype} of shape {list(images.shape)}; for uint8 images use stamp_uint8."
            )
        return self._stamp(images, generator)

    @abstractmethod
    def _stamp(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """The stamped images, new memory. Raises ImageError if the trigger does not fit."""

    @property
    def name(self) -> str:
        """The kind, as in JSON and on the command line."""
        return self.kind

    @property
    def title(self) -> str:
        """Kind, size or strength, and what else is not the default: ``patch (size 24, margin 15)``."""
        told = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            short = isinstance(value, str | int | float | tuple)
            if short and (field.name in _ALWAYS_TOLD or value != field.default):
                told.append(
                    f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}"
                )
        return f"{self.kind} ({', '.join(told)})" if told else self.kind

    @property
    def static(self) -> bool:
        """Whether every image gets the same change at the same place."""
        return True

    @property
    def sample_specific(self) -> bool:
        """Whether what is stamped, and not only its place, differs from image to image."""
        return False

    def mask_area(self, shape: tuple[int, int]) -> float:
        """The share, 0 to 1, of the pixels of an image of ``shape`` (height, width) that can change."""
        return 1.0

    def at_test(self) -> "Trigger":
        """The trigger as the attacker stamps it on test images; itself, unless its places differ there."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A JSON description from which ``load_trigger`` makes an equal trigger."""
        adapters = _adapters(type(self))
        found = {
            name: adapter.dump_python(getattr(self, name), mode="json") for name, adapter in adapters.items()
        }
        return {"kind": self.kind, **found}

    def __eq__(self, other: object) -> bool:
        """Whether kind and all settings are the same."""
        return isinstance(other, Trigger) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        """Agrees with ``==``."""
        return hash(json.dumps(self.to_dict()))


TriggerT = TypeVar("TriggerT", bound=type[Trigger])


def trigger_kind(cls: TriggerT) -> TriggerT:
    """Class decorator: ``load_trigger`` knows this kind from now on."""
    if _KINDS.get(cls.kind, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"Two triggers are of kind '{cls.kind}': {_KINDS[cls.kind]} and {cls}.")
    _KINDS[cls.kind] = cls
    return cls


def trigger_class(kind: object) -> type[Trigger]:
    """The class of a kind.

    Raises:
        SettingError: there is no such kind; the message lists the known ones.
    """
    if not isinstance(kind, str) or kind not in _KINDS:
        raise SettingError(f"Unknown kind of trigger {kind!r}; expected one of: {', '.join(sorted(_KINDS))}.")
    return _KINDS[kind]


def stamp_uint8(trigger: Trigger, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stamp uint8 ``[N, 3, H, W]`` images and round to uint8, for poison that is stored without loss.

    Pixels that the trigger leaves alone keep their exact values.

    Raises:
        ImageError: the images are of another type, or the trigger does not fit them.
    """
    if images.dtype != torch.uint8:
        raise ImageError(f"stamp_uint8 expects uint8 images, found {images.dtype}; call the trigger itself.")
    return (trigger(images.float() / 255, generator) * 255).round_().to(torch.uint8)


def reason(error: ValidationError, skip: int = 0) -> str:
    """What pydantic found first, as the end of a sentence; ``skip`` leaves out the start of its path."""
    first = error.errors()[0]
    where = "".join(f"[{part}]" for part in first["loc"][skip:])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}{f' at {where}' if where else ''}"


def _adapters(cls: type[Trigger]) -> dict[str, TypeAdapter[Any]]:
    cached: dict[str, TypeAdapter[Any]] | None = cls.__dict__.get("_adapter_cache")
    if cached is None:
        hints = get_type_hints(cls, include_extras=True)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cached = {field.name: TypeAdapter(hints[field.name]) for field in fields}
        cls._adapter_cache = cached  # type: ignore[attr-defined]
    return cached


_ROUNDING = 1e-5  # a computed pattern may leave its range by a rounding error


class _Array:
    """Checks a float tensor given as such or as nested lists: its axes, its range, that it is finite."""

    def __init__(self, axes: str, low: float) -> None:
        self.axes, self.low = axes, low

    def __call__(self, value: object) -> Tensor:
        try:
            array = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"expected numbers [{self.axes}], found no such table") from None
        names = self.axes.split(", ")
        fits = array.ndim == len(names) and (len(names) == 2 or array.shape[0] == 3) and array.numel() > 0
        if not fits or not array.is_floating_point():
            raise ValueError(
                f"expected floats [{self.axes}], found {array.dtype} of shape {list(array.shape)}"
            )
        least, most = float(array.min()), float(array.max())
        if not (self.low - _ROUNDING <= least and most <= 1 + _ROUNDING):
            raise ValueError(f"expected values from {self.low:g} to 1, found {least:g} to {most:g}")
        return array.clamp(self.low, 1)


def _lists(array: Tensor) -> list[Any]:
    """Nested lists with the nine digits that bring a float32 back exactly."""
    flat = [float(f"{value:.9g}") for value in array.detach().flatten().tolist()]
    for size in reversed(array.shape[1:]):
        flat = [flat[start : start + size] for start in range(0, len(flat), size)]  # type: ignore[misc]
    return flat


Mask = Annotated[Tensor, PlainValidator(_Array("H, W", 0.0)), PlainSerializer(_lists)]
"""``[H, W]`` in [0, 1]."""
Colours = Annotated[Tensor, PlainValidator(_Array("3, H, W", 0.0)), PlainSerializer(_lists)]
"""``[3, H, W]`` in [0, 1]."""
Additions = Annotated[Tensor, PlainValidator(_Array("3, H, W", -1.0)), PlainSerializer(_lists)]
"""``[3, H, W]`` in [-1, 1]."""
Count = Annotated[int, Field(strict=True, ge=1)]
"""1, 2, ..."""
Index = Annotated[int, Field(strict=True, ge=0)]
"""0, 1, ..."""
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
"""0 to 1."""
Weight = Annotated[float, Field(strict=True, gt=0, le=1)]
"""Above 0, to 1."""
Flag = Annotated[bool, Field(strict=True)]
"""True or False."""
