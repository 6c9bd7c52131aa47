"""What was trained beside an encoder and is kept: plain named tensors in a safetensors file."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from encoderguard.storage import write_atomic

__all__ = ["write_head"]


def write_head(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write contiguous CPU tensors by name, atomically."""
    return write_atomic(path, lambda part: save_file(dict(tensors), part))
