"""Does a loaded encoder behave like one? Finds wrong preprocessing, collapse, and inputs that are ignored."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError
from encoderguard.random import Rng

__all__ = ["check_encoder"]

_MOST = 256  # images looked at
_BATCH = 64
_CONSTANT = 1e-3  # spread of features relative to their norm
_ONE_DIMENSION = 1.05  # effective rank
_IGNORED = 0.02  # change of features relative to the change between two images
_SCALE = 3.0  # standard deviations before the first BatchNorm relative to those stored in it, or the inverse
_SHIFT = 2.0  # their means, in stored standard deviations


class _First(NamedTuple):
    """The BatchNorm that runs first, and its inputs' statistics per channel."""

    norm: nn.BatchNorm2d
    mean: Tensor
    std: Tensor


def check_encoder(encoder: Encoder, images: Tensor) -> list[str]:
    """Warnings, one sentence each, about an encoder that does not behave like a trained one on these images.

    The thresholds are wide enough for images of other data sets than the encoder was trained on.
    Preprocessing is checked against the statistics that the first BatchNorm stored in training; encoders
    without BatchNorm carry no such trace, and theirs is not checked. No warning does not prove that
    anything is right.

    Args:
        encoder: left unchanged.
        images: float ``[N, 3, H, W]`` in [0, 1], N >= 8; at most 256 are used.

    Raises:
        ImageError: fewer than 8 images, or pixels outside [0, 1].
        EncoderError: features are not finite.
    """
    if images.ndim != 4 or len(images) < 8:
        raise ImageError(
            f"Checking an encoder takes at least 8 images [N, 3, H, W], found shape {list(images.shape)}."
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise ImageError(
            f"Expected pixels in [0, 1], found {float(images.min()):.3g} to {float(images.max()):.3g}; "
            "the encoder normalises, callers do not."
        )
    probe = encoder.frozen()
    images = images[:_MOST].to(probe.mean.device, torch.float32)
    features, first = _observe(probe, images)
    if not features.isfinite().all():
        share = 1 - float(features.isfinite().all(1).float().mean())
        raise EncoderError(
            f"The features of {share:.0%} of the images are not finite; the weights are damaged."
        )
    return [*_preprocessing(first), *(_collapse(features) or _ignored(probe, images, features))]


def _observe(probe: Encoder, images: Tensor) -> tuple[Tensor, _First | None]:
    """Features, and the statistics of what enters the BatchNorm that runs first."""
    norms = [part for part in probe.backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    seen: list[nn.BatchNorm2d] = []
    sums: list[Tensor] = []  # of 1, x and x squared, [3, C] per batch

    def hook(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if not seen:
            seen.append(module)
        if module is seen[0]:
            x = inputs[0].double()
            sums.append(torch.stack([part.sum((0, 2, 3)) for part in (torch.ones_like(x), x, x.square())]))

    handles = [norm.register_forward_pre_hook(hook) for norm in norms if norm.track_running_stats]
    features = _features(probe, images)
    for handle in handles:
        handle.remove()
    if not seen:
        return features, None
    count, total, squares = torch.stack(sums).sum(0)
    mean = total / count
    return features, _First(seen[0], mean, (squares / count - mean.square()).clamp_min(0).sqrt())


def _features(probe: Encoder, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([probe(batch) for batch in torch.split(images, _BATCH)])


def _preprocessing(first: _First | None) -> list[str]:
    """Compare the inputs of the first BatchNorm with the statistics it learned."""
    if first is None or first.norm.running_mean is None or first.norm.running_var is None:
        return []
    mean, variance = first.norm.running_mean.double(), first.norm.running_var.double()
    if not mean.any() and (variance == 1).all():
        return ["The BatchNorm statistics are those of an untrained network: it has seen no data."]
    alive = variance > 1e-3 * variance.median()  # dead channels have no scale to compare
    scale = variance[alive].sqrt()
    found = first.std[alive] / scale
    shift = float(((first.mean - mean)[alive] / scale).square().mean().sqrt())
    low, high = float(found.quantile(0.1)), float(found.quantile(0.9))
    if high < 1 / _SCALE or low > _SCALE or shift > _SHIFT:
        return [
            "The preprocessing is probably wrong: before the first BatchNorm, the standard deviation is "
            f"{float(found.median()):.2g} times what it was in training and the mean is {shift:.2g} "
            "standard deviations away; check mean, std and the input size."
        ]
    return []


def _collapse(features: Tensor) -> list[str]:
    centred = features - features.mean(0)
    spread = float(centred.norm(dim=1).mean() / features.norm(dim=1).mean().clamp_min(1e-12))
    if spread < _CONSTANT:
        return [
            f"The features are almost the same for all images (spread {spread:.1e} of their norm): "
            "the encoder collapsed."
        ]
    energy = torch.linalg.svdvals(centred.double()).square()
    share = energy / energy.sum()
    rank = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))  # Roy and Vetterli 2007
    if rank < _ONE_DIMENSION:
        return [
            f"The features vary along one direction only (effective rank {rank:.2f}): the encoder collapsed."
        ]
    return []


def _ignored(probe: Encoder, images: Tensor, features: Tensor) -> list[str]:
    """Change of the features for shuffled pixels, relative to their change for another image."""
    between = (features - features.roll(1, 0)).norm(dim=1).mean()
    order = Rng(0).permutation(images.shape[2] * images.shape[3], "check_encoder").to(images.device)
    shuffled = images.flatten(2)[:, :, order].view_as(images)
    change = float((features - _features(probe, shuffled)).norm(dim=1).mean() / between)
    if change < _IGNORED:
        return [
            f"Shuffling the pixels of an image moves its features by {change:.1%} of the distance between "
            "two images: the encoder ignores what images show."
        ]
    return []
