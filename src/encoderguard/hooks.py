"""Looking at what passes inside a network, for as long as a context lasts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["captured"]


@contextmanager
def captured(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules, by name, of the last forward pass; gradients flow through them.

    The network goes on with a copy: what follows often writes into its input (an in-place ReLU, ``+=``).

    Args:
        module: gets hooks, which are removed again.
        names: of its submodules.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(part: nn.Module, inputs: object, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
