"""What a gradient search optimises: how raw numbers become triggers, and what each trigger costs.

All tensors of R starts are stacked along the first dimension; the first ``free`` of them are optimised, the
others (the place of a patch, say) stay.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar, final

import torch
from torch import Tensor

from encoderguard.run import Run
from encoderguard.triggers import Additive, MaskedPattern, Trigger

__all__ = [
    "BoundedAdditive",
    "FreePattern",
    "MaskAndPattern",
    "Parametrisation",
    "Tensors",
    "stacked",
    "start_all",
]

Tensors = tuple[Tensor, ...]
T_co = TypeVar("T_co", bound=Trigger, covariant=True)
_INSIDE = 0.98
"""A pattern that a search starts from is drawn this far towards the middle: at the very edge of the range the
squashing has no gradient."""


class Parametrisation(Protocol[T_co]):
    """One kind of trigger with free parameters."""

    @property
    def free(self) -> int:
        """How many of the raw tensors are optimised."""

    def start(self, number: int, shape: tuple[int, int], generator: torch.Generator) -> Tensors:
        """Raw tensors of one start, on the CPU, for images of height and width ``shape``."""

    def decode(self, raw: Tensors) -> Tensors:
        """Raw to effective values, elementwise."""

    def stamp(self, images: Tensor, values: Tensors) -> Tensor:
        """Images ``[B, 3, H, W]`` and effective values of R starts to ``[R, B, 3, H, W]`` in [0, 1]."""

    def cost(self, values: Tensors) -> Tensor:
        """``[R]``: what lambda weighs in a search for the smallest trigger."""

    def size(self, values: Tensors) -> Tensor:
        """``[R]`` in [0, 1]: what such a search reports."""

    def trigger(self, values: Tensors) -> T_co:
        """The trigger of one start's values (without the first dimension), on the CPU."""


@final
@dataclass(frozen=True)
class MaskAndPattern:
    """Neural Cleanse's and DECREE's: a mask ``[H, W]`` and a pattern ``[3, H, W]``, both free, from noise."""

    free: int = 2

    def start(self, number: int, shape: tuple[int, int], generator: torch.Generator) -> Tensors:
        """See Parametrisation."""
        mask = _logit(torch.rand(shape, generator=generator))
        return mask, _logit(torch.rand(3, *shape, generator=generator))

    def decode(self, raw: Tensors) -> Tensors:
        """See Parametrisation."""
        return _squash(raw[0]), _squash(raw[1])

    def stamp(self, images: Tensor, values: Tensors) -> Tensor:
        """See Parametrisation."""
        mask, pattern = values
        return torch.lerp(images[None], pattern[:, None], mask[:, None, None])

    def cost(self, values: Tensors) -> Tensor:
        """``|m|_1``, which counts the three channels that share the mask."""
        return 3 * values[0].sum((1, 2))

    def size(self, values: Tensors) -> Tensor:
        """The mean of the mask: PL1."""
        return values[0].mean((1, 2))

    def trigger(self, values: Tensors) -> MaskedPattern:
        """See Parametrisation."""
        return MaskedPattern(values[0].cpu().clone(), values[1].cpu().clone())


@final
@dataclass(frozen=True, eq=False)
class FreePattern:
    """A free pattern under masks that stay: a patch at a place, or with a constant mask a blend."""

    masks: Tensor
    """``[R, H, W]`` in [0, 1], one per start."""
    patterns: Tensor
    """``[R, 3 or 1, H, W]`` in [0, 1]: where each start begins. With one channel all share it."""
    free: int = 1

    def start(self, number: int, shape: tuple[int, int], generator: torch.Generator) -> Tensors:
        """See Parametrisation."""
        return _logit(0.5 + _INSIDE * (self.patterns[number] - 0.5)), self.masks[number]

    def decode(self, raw: Tensors) -> Tensors:
        """See Parametrisation."""
        return _squash(raw[0]), raw[1]

    def stamp(self, images: Tensor, values: Tensors) -> Tensor:
        """See Parametrisation."""
        pattern, mask = values
        return torch.lerp(images[None], pattern[:, None], mask[:, None, None])

    def cost(self, values: Tensors) -> Tensor:
        """See Parametrisation; nothing that is free changes it."""
        return 3 * values[1].sum((1, 2))

    def size(self, values: Tensors) -> Tensor:
        """The mean of the mask."""
        return values[1].mean((1, 2))

    def trigger(self, values: Tensors) -> MaskedPattern:
        """See Parametrisation."""
        return MaskedPattern(values[1].cpu().clone(), values[0].cpu().expand(3, -1, -1).clone())


@final
@dataclass(frozen=True, eq=False)
class BoundedAdditive:
    """``clamp(x + d)`` with every ``|d| < bound`` (tanh)."""

    bounds: Tensor
    """``[R]``, above 0: the largest change of a pixel, one per start."""
    patterns: Tensor
    """``[R, 3 or 1, H, W]`` in [-1, 1]: the first changes of each start, as fractions of its bound."""
    free: int = 1

    def start(self, number: int, shape: tuple[int, int], generator: torch.Generator) -> Tensors:
        """See Parametrisation."""
        return torch.atanh(_INSIDE * self.patterns[number]), self.bounds[number].clone()

    def decode(self, raw: Tensors) -> Tensors:
        """See Parametrisation."""
        return torch.tanh(raw[0]) * raw[1].view(-1, 1, 1, 1), raw[1]

    def stamp(self, images: Tensor, values: Tensors) -> Tensor:
        """See Parametrisation."""
        return (images[None] + values[0][:, None]).clamp(0, 1)

    def cost(self, values: Tensors) -> Tensor:
        """The sum of all changes."""
        return values[0].abs().sum((1, 2, 3))

    def size(self, values: Tensors) -> Tensor:
        """The mean change of a pixel."""
        return values[0].abs().mean((1, 2, 3))

    def trigger(self, values: Tensors) -> Additive:
        """See Parametrisation."""
        return Additive(values[0].cpu().expand(3, -1, -1).clone())


def start_all(kind: Parametrisation[Trigger], count: int, shape: tuple[int, int], run: Run) -> list[Tensors]:
    """Raw tensors of ``count`` starts on the run's device, the free ones with gradients."""
    raws = []
    for number in range(count):
        parts = kind.start(number, shape, run.rng.generator("restart", number))
        raws.append(tuple(part.to(run.device).requires_grad_(k < kind.free) for k, part in enumerate(parts)))
    return raws


def stacked(raws: list[Tensors]) -> Tensors:
    """The tensors of several starts along a new first dimension."""
    return tuple(map(torch.stack, zip(*raws, strict=True)))


def _logit(uniform: Tensor) -> Tensor:
    return torch.atanh((uniform - 0.5) * (2 - 1e-6))


def _squash(parameter: Tensor) -> Tensor:
    return torch.tanh(parameter) / 2 + 0.5
