"""How active hidden channels are, and what an encoder is without some of them; ``hidden`` finds them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.features import extract
from encoderguard.hidden import Units, edited
from encoderguard.images import ImageSet
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = ["bake", "channel_activations", "masked"]


def channel_activations(
    encoder: Encoder,
    layer: Units,
    images: ImageSet,
    run: Run,
    trigger: Trigger | None = None,
    *,
    reduction: Literal["mean", "max"] = "mean",
) -> Tensor:
    """How active each channel is after its activation: float32 ``[C]`` on the CPU.

    Args:
        encoder: unchanged.
        layer: which channels.
        images: over which, and over all places, is averaged (or the largest taken).
        run: device, precision, progress.
        trigger: stamped on every image first.
        reduction: the mean, or the largest value.

    Raises:
        ImageError: no images.
        NonFiniteError: the features are not finite.
    """
    probe = encoder.frozen().to(run.device)
    seen: list[Tensor] = []

    def watch(channels: Tensor) -> Tensor:
        rows = (channels.movedim(1, -1) if layer.channels_first else channels).flatten(0, -2).float()
        seen.append(rows.amax(0) if reduction == "max" else rows.mean(0).cpu().double() * len(channels))
        return channels

    with edited(probe, layer, watch):
        extract(probe, images, run=run, trigger=trigger)
    total = torch.stack(seen).amax(0) if reduction == "max" else torch.stack(seen).sum(0) / len(images)
    return total.float().cpu()


@contextmanager
def masked(encoder: Encoder, layer: Units, mask: Tensor) -> Iterator[Encoder]:
    """While the context lasts, the channels of ``layer`` are multiplied by ``mask`` (to try it out).

    Args:
        encoder: gets a hook, which is removed again.
        layer: which channels.
        mask: ``[C]``, bool (True keeps) or float; gradients reach a float mask.

    Raises:
        SettingError: the mask has another length.
    """
    _require_length(layer, mask)

    def multiply(channels: Tensor) -> Tensor:
        return channels * layer.aligned(mask.to(channels.device, channels.dtype))

    with edited(encoder, layer, multiply):
        yield encoder


def bake(encoder: Encoder, layer: Units, mask: Tensor) -> Encoder:
    """A copy whose weights hold the mask: without any hook, the channels that it drops are zero.

    Scale and shift of the normalisation become 0 there; so do the filters and biases of the producer, unless
    the normalisation mixes channels (GroupNorm, LayerNorm): then they still count in its statistics.

    Args:
        encoder: unchanged.
        layer: which channels.
        mask: bool ``[C]``, True keeps.

    Raises:
        SettingError: the mask has another length, or is not bool.
    """
    _require_length(layer, mask)
    if mask.dtype != torch.bool:
        raise SettingError(f"Only a bool mask can be baked into weights, found {mask.dtype}; compare first.")
    copy = encoder.clone()
    producer: Any = copy.backbone.get_submodule(layer.producer)
    norm: Any = None if layer.norm is None else copy.backbone.get_submodule(layer.norm)
    tensors = [] if norm is None else [norm.weight, norm.bias]
    if norm is None or isinstance(norm, nn.BatchNorm2d):
        tensors += [producer.weight, producer.bias]
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor[~mask.to(tensor.device)] = 0
    return copy


def _require_length(layer: Units, mask: Tensor) -> None:
    if mask.shape != (layer.count,):
        raise SettingError(
            f"The mask of {layer.producer} needs {layer.count} values, found shape {list(mask.shape)}."
        )
