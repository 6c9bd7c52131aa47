"""The one-file bundle of an encoder: safetensors, with everything but the weights in its header."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from encoderguard.errors import EncoderError
from encoderguard.storage import write_atomic

__all__ = ["FORMAT", "Storage", "listed", "load_state", "read_bundle", "read_provenance", "write_bundle"]

FORMAT = "encoderguard.encoder/1"

Storage = Literal["float32", "float16"]
"""How the weights lie in a file; they are float32 again once they are loaded."""


def read_provenance(path: Path) -> dict[str, Any]:
    """The provenance that ``Encoder.save`` stored in a bundle."""
    return dict(read_bundle(path)[0].get("provenance", {}))


def load_state(module: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Load tensors by name; every key and shape must fit.

    Raises:
        EncoderError: lists missing and unexpected keys, or the first shape that differs.
    """
    own = module.state_dict()
    if not any(name.endswith("num_batches_tracked") for name in tensors):
        tensors = tensors | {
            name: value for name, value in own.items() if name.endswith("num_batches_tracked")
        }
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unexpected:
        raise EncoderError(
            f"{source} does not fit this architecture: missing keys {listed(missing)}, "
            f"unexpected keys {listed(unexpected)}; "
            "check the architecture, width and stem."
        )
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise EncoderError(
                f"{source} does not fit this architecture: '{name}' should have shape {list(value.shape)}, "
                f"found {list(tensors[name].shape)}; check the architecture, width and stem."
            )
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def listed(names: list[str]) -> str:
    """Up to six of the names, for a message."""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"[{shown}]"


def write_bundle(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    spec: dict[str, Any],
    provenance: dict[str, Any],
    dtype: Storage = "float32",
) -> Path:
    """Write contiguous CPU tensors with their specification atomically.

    With ``float16`` matrices and kernels are rounded; vectors (BatchNorm, biases) stay as they are.

    Raises:
        EncoderError: a weight is too large for float16.
    """
    stored = (
        {name: _rounded(name, value) for name, value in tensors.items()} if dtype == "float16" else tensors
    )
    header = json.dumps({"format": FORMAT, "spec": spec, "provenance": provenance, "stored": dtype})
    return write_atomic(path, lambda part: save_file(stored, part, metadata={"encoderguard": header}))


def _rounded(name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.float32 or value.ndim < 2:
        return value
    small = value.half()
    if not bool(small.isfinite().all()):
        raise EncoderError(
            f"'{name}' holds values that float16 cannot hold, up to {float(value.abs().max()):.3g}; "
            "store the encoder as float32."
        )
    return small


def read_bundle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a bundle.

    Raises:
        EncoderError: no file, not safetensors, or not a bundle of this format.
    """
    try:
        there = path.is_file()
    except OSError as error:
        raise EncoderError(f"{str(path)[:80]}... cannot be used: {error.strerror}; give another.") from None
    if not there:
        raise EncoderError(f"There is no encoder file {path}.")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path} is not a readable safetensors file: {error}.") from None
    try:
        header = dict(json.loads(metadata.get("encoderguard", "{}")))
    except (ValueError, TypeError, RecursionError):
        header = {}
    if header.get("format") != FORMAT:
        raise EncoderError(
            f"{path} is not an EncoderGuard bundle of format {FORMAT} (found {header.get('format')}); "
            "name its architecture, as in timm:NAME@FILE or resnet18:FILE, or load it with Encoder.wrap."
        )
    return header, tensors
