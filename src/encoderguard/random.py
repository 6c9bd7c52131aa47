"""Named random streams from one seed, so that adding a draw in one place changes none elsewhere."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Rng", "isolated"]


@dataclass(frozen=True)
class Rng:
    """A seed and a path of names; every stream below it is a pure function of the two.

    Generators live on the CPU: draws are then the same whatever device the tensors move to.
    """

    seed: int
    path: tuple[str, ...] = ()

    def child(self, *names: object) -> "Rng":
        """The streams below ``names``; independent of every other child."""
        return Rng(self.seed, (*self.path, *map(str, names)))

    def integer(self, *names: object) -> int:
        """A non-negative 63-bit integer for this name."""
        text = "/".join((str(self.seed), *self.path, *map(str, names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *names: object) -> torch.Generator:
        """A CPU torch generator for this name."""
        return torch.Generator().manual_seed(self.integer(*names))

    def numpy_generator(self, *names: object) -> np.random.Generator:
        """A NumPy generator for this name."""
        return np.random.default_rng(self.integer(*names))

    def permutation(self, n: int, *names: object) -> torch.Tensor:
        """A random order of ``range(n)``, int64 ``[n]``."""
        return torch.randperm(n, generator=self.generator(*names))


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators (module initialisation, dropout), then restore them."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
