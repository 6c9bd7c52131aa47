"""The two steps of ABS on an encoder: stimulate hidden channels, then invert small masks that excite them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, NonFiniteError
from encoderguard.hidden import Units, edited
from encoderguard.images import ImageSet
from encoderguard.pruning import channel_activations
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine, standardise
from encoderguard.triggers import MaskedPattern

__all__ = ["COLLAPSE", "Goal", "Neuron", "invert_neurons", "keep_largest", "set_channels", "stimulate"]

_TOGETHER = 64
"""Channels that are set at once: one copy of the tail's maps each."""
_OVERRUN = 10.0
"""Weight of the share by which a mask exceeds its area."""


@dataclass(frozen=True)
class Goal:
    """What a trigger would do to the features of stamped images."""

    scores: Callable[[Tensor, Tensor], Tensor]
    """Features ``[K, N, D]`` of K variants of N images, and clean ones ``[M, D]``, to ``[K, A]``: large is
    what a trigger would do, in each of A answers."""
    logarithmic: bool = False
    """Whether a search raises the logarithm: of probabilities near 0, which have next to no gradient."""

    def worth(self, features: Tensor, clean: Tensor, answers: list[int]) -> Tensor:
        """Of each variant in its own answer, ``[K]``: what a search raises."""
        own = self.scores(features, clean)[torch.arange(len(answers)), answers]
        return own.clamp_min(1e-8).log() if self.logarithmic else own


COLLAPSE = Goal(lambda features, clean: mean_pairwise_cosine(standardise(features, clean))[:, None])
"""Images look alike: the mean pairwise cosine of features standardised over the clean ones; one answer."""


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """A hidden channel and what setting it does."""

    layer: Units
    channel: int
    answer: int
    """The answer of the goal that rises most."""
    rise: float
    """Of the goal, at the level that raises it most."""
    level: float
    largest: float
    """The channel's largest value on clean images."""


def set_channels(channels: Tensor, layer: Units, which: Tensor, values: Tensor) -> Tensor:
    """K copies of one image's channels, in each of which another channel is constant.

    Args:
        channels: ``[1, C, H, W]`` or ``[1, ..., C]``.
        layer: says which of the two.
        which: int64 ``[K]``.
        values: ``[K]``.

    Returns:
        ``[K, C, H, W]`` or ``[K, ..., C]``; the argument is unchanged.
    """
    copies = channels.expand(len(which), *channels.shape[1:]).clone()
    first = copies if layer.channels_first else copies.movedim(-1, 1)  # a view
    rows = torch.arange(len(which), device=channels.device)
    first[rows, which.to(channels.device)] = values.to(first).view(-1, *[1] * (first.ndim - 2))
    return copies


def stimulate(
    encoder: Encoder, layer: Units, images: ImageSet, levels: tuple[float, ...], goal: Goal, *, run: Run
) -> list[Neuron]:
    """Set each channel of ``layer`` to each level times its clean maximum, and measure the goal.

    What lies before the layer runs once per image; what lies behind it runs on all variants as one batch,
    with the shortcut of the one image broadcast to them.

    Raises:
        EncoderError: the part behind the layer does not keep variants apart.
        NonFiniteError: features are NaN or infinite.
        Stopped: the user asked to stop.
    """
    largest = channel_activations(encoder, layer, images, run, reduction="max")
    probe = encoder.frozen().to(run.device)
    pixels = images.take(range(len(images))).to(run.device).float() / 255
    with torch.no_grad():
        clean = torch.cat([probe(image[None]) for image in pixels])
    before = goal.scores(clean[None], clean)
    which = torch.arange(layer.count).repeat_interleave(len(levels))
    values = largest[which] * torch.tensor(levels).repeat(layer.count)
    rises = []
    for start in range(0, len(which), _TOGETHER):
        run.check_stop()
        part = slice(start, start + _TOGETHER)
        features = _variants(probe, layer, pixels, which[part], values[part], run)
        rises.append((goal.scores(features, clean) - before).cpu())
        run.progress("stimulate channels", min(start + _TOGETHER, len(which)), len(which))
    rise = torch.cat(rises).view(layer.count, -1)  # levels, and of each the answers
    if not bool(rise.isfinite().all()):
        raise NonFiniteError(f"Features are not finite when channels behind {layer.producer} are raised.")
    best, answers = rise.max(1), before.shape[1]
    return [
        Neuron(
            layer=layer,
            channel=channel,
            answer=int(best.indices[channel]) % answers,
            rise=float(best.values[channel]),
            level=levels[int(best.indices[channel]) // answers],
            largest=float(largest[channel]),
        )
        for channel in range(layer.count)
    ]


@torch.no_grad()
def _variants(
    probe: Encoder, layer: Units, pixels: Tensor, which: Tensor, values: Tensor, run: Run
) -> Tensor:
    """Features ``[K, N, D]`` of N images with another channel set in each of K variants."""
    found = []
    with edited(probe, layer, lambda channels: set_channels(channels, layer, which, values)):
        for image in pixels:
            try:
                with run.autocast():
                    features = probe(image[None])
            except (RuntimeError, EncoderError):
                features = pixels.new_empty(0, 0)
            if len(features) != len(which):
                raise EncoderError(
                    f"The part of the encoder ({probe.spec.architecture}) behind {layer.producer} does not "
                    "run on several variants of one image at once, so its channels cannot be stimulated; "
                    "choose another detector."
                )
            found.append(features.float())
    return torch.stack(found, dim=1)


def keep_largest(masks: Tensor, area: float) -> Tensor:
    """``[R, H, W]`` with all but the largest ``floor(area H W)`` values (one at least) of each set to 0."""
    flat = masks.flatten(1)
    kept = flat.topk(max(1, int(area * flat.shape[1])), dim=1).indices
    return (flat * torch.zeros_like(flat).scatter(1, kept, 1.0)).view_as(masks)


def invert_neurons(
    encoder: Encoder,
    images: ImageSet,
    neurons: list[Neuron],
    goal: Goal,
    *,
    area: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    run: Run,
) -> list[MaskedPattern]:
    """One trigger per channel, all as one batch: it excites the channel and brings the goal about.

    Minimises ``-a / max a - goal + 10 max(mean(m) / area - 1, 0)`` with Adam, ``a`` being the channel's
    mean. In the last third of the steps, and in what is returned, at most ``area`` of the pixels are covered.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        Stopped: the user asked to stop.
    """
    probe = encoder.frozen().to(run.device)
    pixels = images.take(range(len(images))).to(run.device)
    with torch.no_grad():
        clean = torch.cat([probe(part.float() / 255) for part in torch.split(pixels, 256)])
    answers, generator = [neuron.answer for neuron in neurons], run.rng.generator("start")
    shape = (pixels.shape[-2], pixels.shape[-1])
    raw_mask = torch.randn(len(neurons), *shape, generator=generator).sub(1).to(run.device).requires_grad_()
    raw_pattern = torch.randn(len(neurons), 3, *shape, generator=generator).to(run.device).requires_grad_()
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], lr=learning_rate, betas=(0.5, 0.9))
    for step in range(steps):
        run.check_stop()
        batch = pixels[run.rng.permutation(len(pixels), "batch", step)[:batch_size]].float() / 255
        masks = raw_mask.sigmoid()
        masks = keep_largest(masks, area) if 3 * step >= 2 * steps else masks
        stamped = torch.lerp(batch[None], raw_pattern.sigmoid()[:, None], masks[:, None, None])
        with _watched(probe, neurons, len(batch)) as excited, run.autocast():
            features = probe(stamped.flatten(0, 1)).float().unflatten(0, stamped.shape[:2])
        worth = goal.worth(features, clean, answers)
        excess = (masks.mean((1, 2)) / area - 1).clamp_min(0)
        loss = (_OVERRUN * excess - worth - torch.stack(excited)).sum()
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"The loss of the trigger search became NaN or infinite at step {step}.")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        run.progress("invert channels", step + 1, steps, f"best {float(worth.detach().max()):.3f}")
    final = keep_largest(raw_mask.detach().sigmoid(), area).cpu()
    return [
        MaskedPattern(mask, pattern)
        for mask, pattern in zip(final, raw_pattern.detach().sigmoid().cpu(), strict=True)
    ]


@contextmanager
def _watched(probe: Encoder, neurons: list[Neuron], batch: int) -> Iterator[list[Tensor]]:
    """The mean of each neuron's channel on its own stamped images, over its clean maximum."""
    found: list[Tensor] = [torch.zeros((), device=probe.mean.device)] * len(neurons)

    def watch(layer: Units, channels: Tensor) -> Tensor:
        rows = (channels.movedim(1, -1) if layer.channels_first else channels).flatten(1, -2).mean(1)
        for place, neuron in enumerate(neurons):
            if neuron.layer == layer:
                own = rows[place * batch : (place + 1) * batch, neuron.channel].float().mean()
                found[place] = own / max(neuron.largest, 1e-6)
        return channels

    with ExitStack() as stack:
        for layer in {neuron.layer: None for neuron in neurons}:
            stack.enter_context(edited(probe, layer, lambda channels, layer=layer: watch(layer, channels)))  # type: ignore[misc]
        yield found
