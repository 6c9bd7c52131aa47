"""What a module is put into: eval mode for a while, or random weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from encoderguard.bundles import listed
from encoderguard.errors import EncoderError

__all__ = ["evaluating", "reinitialise"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the module and its parts; afterwards each part has its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def reinitialise(module: nn.Module) -> None:
    """Draw all weights anew, by the ``reset_parameters`` of every part, from torch's global generator.

    Raises:
        EncoderError: something learnt is what it was before: no part resets it.
    """
    before = {name: value.detach().clone() for name, value in _learnt(module).items()}
    uncovered = {id(parameter) for parameter in module.parameters()}
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            _reset_part(part, reset)
            uncovered -= {id(parameter) for parameter in part.parameters()}
    left = [
        name
        for name, value in _learnt(module).items()
        if torch.equal(value, before[name]) and (id(value) in uncovered or value.min() != value.max())
    ]
    if left:
        raise EncoderError(
            "The wrapped module cannot be re-initialised: "
            f"no reset_parameters reaches {listed(left)}; give it one."
        )


def _learnt(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the statistics of normalisations; other buffers may be fixed by the architecture."""
    running = {name: value for name, value in module.named_buffers() if "running_" in name}
    return dict(module.named_parameters()) | running


def _reset_part(part: nn.Module, reset: Callable[[], object]) -> None:
    """A parametrised weight is computed at each access: what ``reset`` writes there goes to its setter."""
    if not parametrize.is_parametrized(part):
        reset()
        return
    with torch.no_grad(), parametrize.cached():
        reset()
        drawn = {name: getattr(part, name).clone() for name in part.parametrizations}  # type: ignore[union-attr]
    for name, value in drawn.items():
        setattr(part, name, value)
