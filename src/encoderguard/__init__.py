"""EncoderGuard: does a pre-trained image encoder carry a backdoor, and how do I get a clean one?

The jobs of the command line are functions of ``encoderguard.jobs``; ``registry`` finds methods by name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encoderguard.demo import run_demo
    from encoderguard.encoder import Encoder, EncoderSpec
    from encoderguard.errors import EncoderGuardError, RunError, UsageError
    from encoderguard.images import ImageSet, load_images
    from encoderguard.loading import check_encoder, load_encoder
    from encoderguard.methods import (
        Defense,
        Detection,
        Detector,
        EncoderAttack,
        Planted,
        Pretrained,
        Pretraining,
        Purified,
        Reference,
    )
    from encoderguard.random import Rng
    from encoderguard.registry import create, method_names, register
    from encoderguard.results import read_record
    from encoderguard.run import Run
    from encoderguard.triggers import MaskedPattern, Patch, Trigger, load_trigger

__all__ = [
    "Defense",
    "Detection",
    "Detector",
    "Encoder",
    "EncoderAttack",
    "EncoderGuardError",
    "EncoderSpec",
    "ImageSet",
    "MaskedPattern",
    "Patch",
    "Planted",
    "Pretrained",
    "Pretraining",
    "Purified",
    "Reference",
    "Rng",
    "Run",
    "RunError",
    "Trigger",
    "UsageError",
    "check_encoder",
    "create",
    "load_encoder",
    "load_images",
    "load_trigger",
    "method_names",
    "read_record",
    "register",
    "run_demo",
]

_HOMES = {
    "demo": ("run_demo",),
    "encoder": ("Encoder", "EncoderSpec"),
    "errors": ("EncoderGuardError", "RunError", "UsageError"),
    "images": ("ImageSet", "load_images"),
    "loading": ("check_encoder", "load_encoder"),
    "methods": (
        "Defense",
        "Detection",
        "Detector",
        "EncoderAttack",
        "Planted",
        "Pretrained",
        "Pretraining",
        "Purified",
        "Reference",
    ),
    "random": ("Rng",),
    "registry": ("create", "method_names", "register"),
    "results": ("read_record",),
    "run": ("Run",),
    "triggers": ("MaskedPattern", "Patch", "Trigger", "load_trigger"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import encoderguard`` does not wait for torch."""
    if name in _HOME_OF:
        return getattr(import_module(f"encoderguard.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'encoderguard' has no attribute '{name}'")
