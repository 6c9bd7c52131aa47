"""Triggers as files: our own JSON, and the field's ``.npz`` with its convention, kept in this one place."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoderguard.errors import ImageError, SettingError
from encoderguard.storage import write_text
from encoderguard.triggers.base import Trigger, trigger_class
from encoderguard.triggers.patches import MaskedPattern

__all__ = [
    "PLAIN",
    "RECOVERED",
    "STRONGEST",
    "load_found",
    "load_trigger",
    "read_field_trigger",
    "save_trigger",
    "trigger_from_dict",
]

RECOVERED = "recovered-trigger.json"
STRONGEST, PLAIN = "strongest-trigger.json", "plain-trigger.json"
"""Files of a scan."""


def save_trigger(trigger: Trigger, path: Path) -> Path:
    """Write ``trigger.json`` atomically."""
    return write_text(path, json.dumps(trigger.to_dict()) + "\n")


def load_trigger(path: Path) -> Trigger:
    """Read a ``trigger.json`` of any kind or one of the field's ``.npz`` trigger files.

    Raises:
        ImageError: the file is missing or is not a trigger.
    """
    if not path.is_file():
        raise ImageError(f"There is no trigger file {path}.")
    if path.suffix == ".npz":
        return read_field_trigger(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise ImageError(f"{path} is not a trigger file: it is not JSON.") from None
    try:
        return trigger_from_dict(content)
    except SettingError as error:
        raise ImageError(f"{path} is not a trigger file: {error}") from None


def load_found(path: Path) -> list[Trigger]:
    """Triggers to unlearn: the one of a file, or those of a scan's folder, the same only once.

    Of a folder the strongest trigger and the plain one, else the recovered one.

    Raises:
        ImageError: nothing of this is there, or it is not a trigger.
    """
    if not path.is_dir():
        return [load_trigger(path)]
    there = [path / name for name in (STRONGEST, PLAIN) if (path / name).is_file()]
    if not there and not (path / RECOVERED).is_file():
        raise ImageError(
            f"The folder {path} holds no trigger that a scan found ({STRONGEST}, {RECOVERED}); "
            "give the folder of a scan that recovers one, or a trigger file."
        )
    found = [load_trigger(file) for file in there or [path / RECOVERED]]
    return [trigger for number, trigger in enumerate(found) if trigger not in found[:number]]


def trigger_from_dict(content: Any) -> Trigger:
    """The trigger that ``to_dict`` described.

    Raises:
        SettingError: no JSON object, an unknown kind, a setting too many or too few, or an impossible value.
    """
    if not isinstance(content, dict):
        raise SettingError("A trigger is a JSON object with a 'kind'.")
    cls = trigger_class(content.get("kind"))
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for what, names in (
        ("lacks", fields - content.keys()),
        ("does not know", content.keys() - fields - {"kind"}),
    ):
        if names:
            raise SettingError(
                f"A {cls.kind} trigger {what} '{min(names)}'; its fields are {_listed(fields)}."
            )
    return cls(**{name: content[name] for name in fields})


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none but its kind"


def read_field_trigger(path: Path) -> MaskedPattern:
    """The BadEncoder family's npz: ``t`` in 0..255 and ``tm`` (1 keeps the image).

    Both are ``[1, H, W, 3]`` or ``[H, W, 3]``.

    Raises:
        ImageError: keys or shapes are others.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            pattern, keep = (np.asarray(data[name], dtype=np.float32) for name in ("t", "tm"))
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{path} is not a trigger file with the arrays 't' and 'tm': {error}.") from None
    pattern, keep = (a[0] if a.ndim == 4 else a for a in (pattern, keep))
    if pattern.shape != keep.shape or pattern.ndim != 3 or pattern.shape[-1] != 3:
        raise ImageError(
            f"{path}: expected 't' and 'tm' of shape [1, H, W, 3], found {pattern.shape}, {keep.shape}."
        )
    if (keep != keep[..., :1]).any():
        raise ImageError(f"{path}: the mask 'tm' differs between colour channels, which is not supported.")
    mask = 1 - torch.from_numpy(keep[..., 0].copy())
    colours = torch.from_numpy(pattern).permute(2, 0, 1) / 255
    try:
        return MaskedPattern(mask, colours * mask)
    except SettingError as error:
        raise ImageError(f"{path} is not a trigger file: {error}") from None
