"""Hidden channels of an encoder: which there are, how active they are, what happens without some of them.

A layer of *hidden units* is what lies between two convolutions (or two linear layers) of one block: the first
makes C channels, perhaps a normalisation scales them, an activation follows, the second reads them. Nothing
else reads them, so a channel can be taken out exactly, and the size of the embedding stays as it is. In a
ResNet these are the inner channels of each block, in a ViT the hidden units of each MLP.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, SettingError
from encoderguard.features import evaluating, extract
from encoderguard.images import ImageSet
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = ["Units", "bake", "channel_activations", "edited", "hidden_units", "last_stage_units", "masked"]

Edit = Callable[[Tensor], Tensor]
"""Maps the channels of a layer, ``[N, C, H, W]`` or ``[N, ..., C]``, to the same shape."""

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Units:
    """One layer of hidden units; the names are those of ``encoder.backbone.named_modules()``."""

    producer: str
    """The convolution or linear layer that makes the channels."""
    norm: str | None
    """The normalisation between the two, if there is one."""
    consumer: str
    """The convolution or linear layer that reads the channels after the activation."""
    count: int
    """C."""
    channels_first: bool
    """Channels are ``[N, C, H, W]`` (convolutions), not ``[N, ..., C]`` (linear layers)."""

    def aligned(self, values: Tensor) -> Tensor:
        """``[C]`` in the shape that multiplies the channels of a batch."""
        return values.view(-1, 1, 1) if self.channels_first else values


def hidden_units(encoder: Encoder) -> list[Units]:
    """Every layer of hidden units, shallow to deep.

    Candidates are found by the order of the modules in a block; one is kept if, in a forward pass in which
    every other channel behind the producer is set to zero, the same channels reach the consumer as zeros.
    """
    modules = dict(encoder.backbone.named_modules())
    candidates = [units for name, part in modules.items() for units in _candidates(name, part)]
    proven: set[Units] = set()
    with ExitStack() as stack, evaluating(encoder), torch.no_grad():
        for units in candidates:
            drop, witness = _drop_odd(units, proven)
            stack.enter_context(edited(encoder, units, drop, before_activation=True))
            stack.enter_context(edited(encoder, units, witness))
        side = encoder.spec.input_size or 32
        ramp = torch.linspace(0, 1, 3 * side * side, device=encoder.mean.device)
        encoder(ramp.view(1, 3, side, side))
    return [units for units in candidates if units in proven]


def last_stage_units(encoder: Encoder) -> list[Units]:
    """The layers of hidden units inside the last tap; the last two of the network if it has fewer than two.

    That is ``layer4`` of a ResNet and the MLPs of the last two blocks of a ViT.

    Raises:
        EncoderError: the encoder has no hidden units.
    """
    found = hidden_units(encoder)
    if not found:
        raise EncoderError(
            f"The encoder ({encoder.spec.architecture}) has no hidden channels that could be taken out: no "
            "block in which one convolution or linear layer feeds the next; choose another method."
        )
    order = [name for name, _ in encoder.backbone.named_modules()]
    *before, last = encoder.spec.taps
    start = max(
        (k for k, name in enumerate(order) if before and f"{name}.".startswith(f"{before[-1]}.")), default=0
    )
    late = set(order[start:])  # a last tap may be the whole trunk
    inside = [units for units in found if units.consumer.startswith(f"{last}.") and units.producer in late]
    return inside if len(inside) > 1 else found[-2:]


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
def edited(
    encoder: Encoder, layer: Units, edit: Edit, *, before_activation: bool = False
) -> Iterator[Encoder]:
    """While the context lasts, ``edit`` is applied to the channels of ``layer`` in every forward pass.

    Args:
        encoder: gets a hook, which is removed again.
        layer: which channels.
        edit: differentiable if gradients are to flow; must not write into its argument.
        before_activation: edit what comes out of the normalisation (or the producer, without one) instead of
            what goes into the consumer.
    """

    def on_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(inputs[0]), *inputs[1:])

    def on_output(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return edit(output)

    if before_activation:
        source = encoder.backbone.get_submodule(layer.norm or layer.producer)
        handle = source.register_forward_hook(on_output)
    else:
        handle = encoder.backbone.get_submodule(layer.consumer).register_forward_pre_hook(on_input)
    try:
        yield encoder
    finally:
        handle.remove()


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


def _candidates(name: str, block: nn.Module) -> Iterator[Units]:
    """Neighbouring convolutions or linear layers among the direct parts of a block, with fitting widths."""
    parts = [(f"{name}.{key}" if name else key, part) for key, part in block.named_children()]
    places = [k for k, (_, part) in enumerate(parts) if isinstance(part, nn.Conv2d | nn.Linear)]
    for k, j in pairwise(places):
        (producer, makes), (consumer, reads) = parts[k], parts[j]
        width, wanted = _widths(makes)[1], _widths(reads)[0]
        if type(makes) is not type(reads) or width != wanted or width < 2:
            continue
        norms = [key for key, part in parts[k + 1 : j] if isinstance(part, _NORMS) and _affine(part, width)]
        yield Units(producer, norms[-1] if norms else None, consumer, width, isinstance(makes, nn.Conv2d))


def _widths(part: nn.Module) -> tuple[int, int]:
    """Channels in and out."""
    if isinstance(part, nn.Conv2d):
        return part.in_channels, part.out_channels
    assert isinstance(part, nn.Linear)
    return part.in_features, part.out_features


def _affine(norm: nn.Module, width: int) -> bool:
    """Whether the normalisation has a scale and a shift for each of ``width`` channels."""
    return all(
        isinstance(value, Tensor) and tuple(value.shape) == (width,) for value in (norm.weight, norm.bias)
    )


def _drop_odd(units: Units, proven: set[Units]) -> tuple[Edit, Edit]:
    """An edit that sets every second channel to zero, and one that looks whether they arrive as zeros."""
    odd = torch.arange(units.count) % 2

    def drop(channels: Tensor) -> Tensor:
        return channels * units.aligned((1 - odd).to(channels.device, channels.dtype))

    def witness(channels: Tensor) -> Tensor:
        if not bool((channels * units.aligned(odd.to(channels.device, channels.dtype))).any()):
            proven.add(units)
        return channels

    return drop, witness


def _require_length(layer: Units, mask: Tensor) -> None:
    if mask.shape != (layer.count,):
        raise SettingError(
            f"The mask of {layer.producer} needs {layer.count} values, found shape {list(mask.shape)}."
        )
