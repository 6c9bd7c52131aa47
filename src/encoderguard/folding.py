"""A faster copy of an encoder for searches that change only its input: frozen, folded, weights cast once."""

import warnings

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.run import Run

__all__ = ["fast_frozen"]

_TOLERANCE = 2e-3
"""Of the largest feature: wrong folding is far outside, the rounding of TF32 devices is inside."""


def fast_frozen(encoder: Encoder, sample: Tensor, run: Run) -> tuple[Encoder, bool]:
    """A frozen eval copy on the run's device, with BatchNorm folded into convolutions where that is exact.

    Args:
        encoder: unchanged.
        sample: images ``[N, 3, H, W]`` in [0, 1] on which the folded copy is compared in float32.
        run: device and precision.

    Returns:
        The copy, and whether it is folded (an untraceable or differing backbone is left as it is).
    """
    fast = encoder.frozen().to(run.device)
    plain, sample = fast.backbone, sample.to(run.device)
    with torch.no_grad():
        expected = fast(sample)
        folded = _fold(plain)
        if folded is not None:
            fast.backbone = folded.requires_grad_(False)
            if not _agrees(fast, sample, expected):
                fast.backbone, folded = plain, None
    if run.low_precision:
        # autocast re-casts frozen weights on every step; casting them once is the same arithmetic
        for part in fast.backbone.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.to(torch.bfloat16)
    return fast, folded is not None


def _fold(backbone: nn.Module) -> nn.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch 2.11 warns of itself when this is imported
        from torch.fx.experimental.optimization import fuse

    if not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules()):
        return None
    try:
        folded: nn.Module = fuse(backbone)
    except Exception:  # tracing runs the module's own code on symbols, which may fail in any way
        return None
    return folded.eval()


def _agrees(encoder: Encoder, sample: Tensor, expected: Tensor) -> bool:
    """Whether the features are as expected, for two batch sizes: tracing may have fixed one."""
    try:
        pairs = [(encoder(sample[:n]), expected[:n]) for n in (len(sample), 1)]
    except RuntimeError:
        return False
    bound = _TOLERANCE * expected.abs().max()
    return all(bool((found - want).abs().max() <= bound) for found, want in pairs)
