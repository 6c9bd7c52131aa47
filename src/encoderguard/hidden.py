"""Hidden channels of an encoder: which there are, and a way to edit them.

A layer of *hidden units* is what lies between two convolutions (or two linear layers) of one block: the first
makes C channels, perhaps a normalisation scales them, an activation follows, the second reads them. Nothing
else reads them, so a channel can be taken out exactly, and the size of the embedding stays as it is. In a
ResNet these are the inner channels of each block, in a ViT the hidden units of each MLP.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError
from encoderguard.modules import evaluating

__all__ = ["Units", "edited", "hidden_units", "last_stage_units"]

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


Arrivals = dict[Units, list[Tensor]]
"""What each consumer reads at its calls in a forward pass."""


def hidden_units(encoder: Encoder) -> list[Units]:
    """Every layer of hidden units, shallow to deep.

    Candidates are found by the order of the modules in a block. One is kept if every other channel behind the
    producer, set to zero, reaches the consumer as zero, and, set to anything else, changes none of the
    channels between: a squeeze-and-excitation gate would scale these by what it reads there.
    """
    modules = dict(encoder.backbone.named_modules())
    candidates = [units for name, part in modules.items() for units in _candidates(name, part)]
    first = _arriving(encoder, candidates, 0.0)
    candidates = [units for units in candidates if first[units] and not _any_odd(units, first[units])]
    proven: set[Units] = set()
    for group in _side_by_side(candidates, list(modules)):
        zero = _arriving(encoder, group, 0.0)
        large = _arriving(encoder, group, 2.0, zero)
        proven |= {units for units in group if _same_even(units, zero[units], large[units])}
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
    if not encoder.spec.taps:
        return found[-2:]
    order = [name for name, _ in encoder.backbone.named_modules()]
    *before, last = encoder.spec.taps
    start = max(
        (k for k, name in enumerate(order) if before and f"{name}.".startswith(f"{before[-1]}.")), default=0
    )
    late = set(order[start:])  # a last tap may be the whole trunk
    inside = [units for units in found if units.consumer.startswith(f"{last}.") and units.producer in late]
    return inside if len(inside) > 1 else found[-2:]


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


def _side_by_side(candidates: list[Units], order: list[str]) -> Iterator[list[Units]]:
    """Groups in none of which one lies between producer and consumer of another."""
    place = {name: k for k, name in enumerate(order)}

    def inside(a: Units, b: Units) -> bool:
        return place[b.producer] < place[a.producer] and place[a.consumer] < place[b.consumer]

    while candidates:
        outer = [a for a in candidates if not any(inside(a, b) for b in candidates)]
        yield outer
        candidates = [units for units in candidates if units not in outer]


def _arriving(
    encoder: Encoder, group: list[Units], times: float, instead: Arrivals | None = None
) -> Arrivals:
    """One pass with every other channel behind each producer so many times the largest.

    Consumers go on with ``instead``, so that nothing behind them changes.
    """
    arriving: Arrivals = {units: [] for units in group}

    def setting(units: Units) -> Edit:
        return lambda channels: torch.where(_odd(units, channels), times * channels.abs().max(), channels)

    def watching(units: Units) -> Edit:
        def watch(channels: Tensor) -> Tensor:
            arriving[units].append(channels.clone())
            return channels if instead is None else instead[units][len(arriving[units]) - 1]

        return watch

    side = encoder.spec.input_size or 32
    ramp = torch.linspace(0, 1, 3 * side * side, device=encoder.mean.device)
    with ExitStack() as stack, evaluating(encoder), torch.no_grad():
        for units in group:
            stack.enter_context(edited(encoder, units, setting(units), before_activation=True))
            stack.enter_context(edited(encoder, units, watching(units)))
        encoder(ramp.view(1, 3, side, side))
    return arriving


def _any_odd(units: Units, arriving: list[Tensor]) -> bool:
    return any(bool(channels[_odd(units, channels)].any()) for channels in arriving)


def _same_even(units: Units, one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.allclose(a[~_odd(units, a)], b[~_odd(units, b)], rtol=1e-4, atol=1e-6)
        for a, b in zip(one, other, strict=True)
    )


def _odd(units: Units, channels: Tensor) -> Tensor:
    """bool, of the shape of ``channels``: every second one."""
    odd = torch.arange(units.count, device=channels.device) % 2 == 1
    return units.aligned(odd).expand_as(channels)
