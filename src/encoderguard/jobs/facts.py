"""The record's descriptions of what a job used."""

from dataclasses import fields
from typing import Any

import torch

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.provenance import peak_memory_bytes, source_facts
from encoderguard.registry import Method
from encoderguard.results import EncoderFacts, ImageFacts
from encoderguard.run import Precision, Run

__all__ = ["encoder_facts", "image_facts", "machine_facts", "passed_settings", "precision_of"]


def encoder_facts(encoder: Encoder, spec: str | None = None) -> EncoderFacts:
    """The record's description of an encoder."""
    own = encoder.spec
    built = own.architecture.startswith("encoderguard:")
    return EncoderFacts(
        spec=spec,
        fingerprint=encoder.fingerprint,
        architecture=own.architecture,
        width=own.width if built else None,
        stem=own.stem if built else None,
        input_size=own.input_size,
        mean=list(own.mean),
        std=list(own.std),
    )


def image_facts(images: ImageSet, whole: ImageSet | None = None) -> ImageFacts:
    """The record's description of an image set that was drawn from ``whole``."""
    whole = images if whole is None else whole
    height, width = images.shape
    return ImageFacts(
        spec=whole.spec,
        name=whole.name,
        count=len(images),
        available=len(whole),
        digest=images.digest,
        height=height,
        width=width,
        labelled=images.labels is not None,
        skipped=list(whole.skipped),
    )


def precision_of(run: Run) -> Precision:
    """The precision in effect."""
    return "bf16" if run.low_precision else "float32"


def machine_facts(run: Run) -> dict[str, Any]:
    """Seed, device, precision, memory, machine and source fields of a record."""
    on_cuda = run.device.type == "cuda"
    return {
        "seed": run.rng.seed,
        "device": str(run.device),
        "device_name": torch.cuda.get_device_name(run.device) if on_cuda else None,
        "precision": precision_of(run),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(run.device) if on_cuda else None,
        **source_facts(),
    }


def passed_settings(method: Method) -> dict[str, Any]:
    """The settings of a method object that are not the defaults."""
    changed = {field.name for field in fields(method) if getattr(method, field.name) != field.default}
    return {name: value for name, value in method.settings().items() if name in changed}
