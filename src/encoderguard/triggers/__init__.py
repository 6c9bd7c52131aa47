"""Triggers: small serialisable objects that stamp float image batches in [0, 1].

A trigger never normalises: pixels in, pixels out, same shape, same range. To add a kind, write a frozen
dataclass with a ``kind`` and ``_stamp`` and decorate it with ``trigger_kind``.
"""

from encoderguard.triggers.altering import ColourMap, Warp
from encoderguard.triggers.badnets import FourCorner, PixelGrid
from encoderguard.triggers.base import (
    Additions,
    Colours,
    Count,
    Flag,
    Index,
    Mask,
    Share,
    Trigger,
    Weight,
    stamp_uint8,
    trigger_kind,
)
from encoderguard.triggers.files import (
    load_found,
    load_trigger,
    read_field_trigger,
    save_trigger,
    trigger_from_dict,
)
from encoderguard.triggers.naming import trigger_named, trigger_names
from encoderguard.triggers.patches import ColourPatch, MaskedPattern, Patch
from encoderguard.triggers.whole_image import Additive, Blend, FreshNoise, SpectralDCT

__all__ = [
    "Additions",
    "Additive",
    "Blend",
    "ColourMap",
    "ColourPatch",
    "Colours",
    "Count",
    "Flag",
    "FourCorner",
    "FreshNoise",
    "Index",
    "Mask",
    "MaskedPattern",
    "Patch",
    "PixelGrid",
    "Share",
    "SpectralDCT",
    "Trigger",
    "Warp",
    "Weight",
    "load_found",
    "load_trigger",
    "read_field_trigger",
    "save_trigger",
    "stamp_uint8",
    "trigger_from_dict",
    "trigger_kind",
    "trigger_named",
    "trigger_names",
]
