"""MESA's networks (Qiao et al. 2019): sub-generators of triggers, and statistics networks that vary them.

``n`` networks of one shape are one computation: their weights are stacked, ``[n, in, out]``, and a layer is
one batched matrix product. Network ``i`` sees slice ``i`` only, so its gradients are those it has alone.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.random import Rng

__all__ = ["Bound", "StatisticsNetworks", "SubGenerators", "dv_bound", "jsd_bound"]

Bound = Literal["dv", "jsd"]
_CHUNKS = 4
_SLOPE = 0.2  # of the leaky rectifiers, as MESA's
_GAIN = 5.0  # before the sigmoid: fresh networks would make grey pictures, and colours would move too slowly


class SubGenerators(nn.Module):
    """``n`` skip-MLPs that turn noise into patterns; each layer gets a fresh quarter of the noise.

    MESA's shape (16 -> h, then (h + 16) -> h twice, then (h + 16) -> pixels, sigmoid at the end) with layer
    normalisation in the place of BatchNorm: a pattern then depends on its own noise only.

    Args:
        count: n, how many sub-generators.
        size: height and width of the patterns.
        rng: weights; sub-generator ``i`` has its own stream.
        hidden: h; MESA's is 512.
        noise: entries of a noise vector, a multiple of 4.
    """

    def __init__(
        self, count: int, size: tuple[int, int], rng: Rng, *, hidden: int = 128, noise: int = 64
    ) -> None:
        super().__init__()
        self.count, self.size, self.noise = count, size, noise
        part, pixels = noise // _CHUNKS, 3 * size[0] * size[1]
        shapes = [(part, hidden), (hidden + part, hidden), (hidden + part, hidden), (hidden + part, pixels)]
        self.weights, self.biases = _stacked(count, shapes, rng)

    def draw(self, draws: int, generator: torch.Generator) -> Tensor:
        """Noise for ``draws`` patterns of every sub-generator: uniform in [0, 1], ``[n, draws, noise]``."""
        return torch.rand(self.count, draws, self.noise, generator=generator).to(self.weights[0].device)

    def forward(self, noise: Tensor) -> Tensor:
        """Patterns ``[n, K, 3, h, w]`` in [0, 1] of noise ``[n, K, noise]``."""
        parts = (2 * noise - 1).chunk(
            _CHUNKS, dim=-1
        )  # centred, else all patterns are much the same at first
        x = torch.baddbmm(self.biases[0], parts[0], self.weights[0])
        for part, weight, bias in zip(parts[1:], self.weights[1:], self.biases[1:], strict=True):
            x = F.leaky_relu(F.layer_norm(x, x.shape[-1:]), _SLOPE)
            x = torch.baddbmm(bias, torch.cat([x, part.to(x)], -1), weight)
        return torch.sigmoid(_GAIN * x.float()).view(*x.shape[:2], 3, *self.size)


class StatisticsNetworks(nn.Module):
    """``n`` networks T(z, x) that bound the mutual information of z and x from below.

    Args:
        count: n.
        noise: entries of z.
        values: entries of x.
        rng: weights; network ``i`` has its own stream.
        hidden: width of both hidden layers; MESA's is 512.
        bound: ``dv`` (Donsker and Varadhan, as MINE and MESA) or ``jsd`` (Jensen-Shannon, as Deep InfoMax).
        rate: of the moving average that corrects the gradient of the logarithm in ``dv`` (MESA: .001).
    """

    log_average: Tensor

    def __init__(
        self,
        count: int,
        noise: int,
        values: int,
        rng: Rng,
        *,
        hidden: int = 128,
        bound: Bound = "dv",
        rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.bound, self.rate = bound, rate
        self.weights, self.biases = _stacked(
            count, [(noise + values, hidden), (hidden, hidden), (hidden, 1)], rng
        )
        self.register_buffer("log_average", torch.full((count,), math.nan))

    def forward(self, z: Tensor, x: Tensor, *, frozen: bool = False) -> Tensor:
        """T of pairs ``z [n, K, noise]``, ``x [n, K, values]``: ``[n, K]``; ``frozen`` takes no gradient."""
        weights, biases = (
            [p.detach() if frozen else p for p in group] for group in (self.weights, self.biases)
        )
        h = F.leaky_relu(torch.baddbmm(biases[0], torch.cat([z, x], -1), weights[0]), _SLOPE)
        h = F.leaky_relu(torch.baddbmm(biases[1], h, weights[1]), _SLOPE)
        values: Tensor = torch.baddbmm(biases[2], h, weights[2]).squeeze(-1).float()
        return values

    def information(self, z: Tensor, x: Tensor, other: Tensor) -> Tensor:
        """The bound ``[n]`` for whoever makes x: its gradient reaches x only.

        Args:
            z: paired with x.
            x: values.
            other: z of other pairs, in the place of draws from the product of the marginals.
        """
        bound = dv_bound if self.bound == "dv" else jsd_bound
        return bound(self(z, x, frozen=True), self(other, x, frozen=True))

    def loss(self, z: Tensor, x: Tensor, other: Tensor) -> Tensor:
        """Minus the bound ``[n]`` for the networks themselves: its gradient reaches their weights only.

        The gradient of ``dv`` divides by a moving average instead of the batch's own mean, which plain
        mini-batches bias (MINE, Eq. 12).
        """
        joint, marginal = self(z, x.detach()), self(other, x.detach())
        if self.bound == "jsd":
            return -jsd_bound(joint, marginal)
        log_mean = torch.logsumexp(marginal, -1) - math.log(marginal.shape[-1])
        now, before = log_mean.detach(), self.log_average
        moved = torch.logaddexp(before + math.log1p(-self.rate), now + math.log(self.rate))
        self.log_average.copy_(torch.where(before.isnan(), now, moved))
        corrected = (log_mean - self.log_average).exp()
        loss: Tensor = log_mean.detach() + corrected - corrected.detach() - joint.mean(-1)
        return loss


def dv_bound(joint: Tensor, marginal: Tensor) -> Tensor:
    """``E_joint T - log E_marginal exp T`` over the last dimension, in nats (Donsker and Varadhan)."""
    bound: Tensor = joint.mean(-1) - torch.logsumexp(marginal, -1) + math.log(marginal.shape[-1])
    return bound


def jsd_bound(joint: Tensor, marginal: Tensor) -> Tensor:
    """``E_joint -sp(-T) - E_marginal sp(T) + 2 log 2`` over the last dimension, sp being softplus.

    In [0, 2 log 2] at its best: not nats of mutual information, but 0 for independence and growing with it.
    """
    return 2 * math.log(2) - F.softplus(-joint).mean(-1) - F.softplus(marginal).mean(-1)


def _stacked(
    count: int, shapes: list[tuple[int, int]], rng: Rng
) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights ``[n, in, out]`` and biases ``[n, 1, out]``, each uniform within 1 / sqrt(in)."""
    generators = [rng.generator("network", i) for i in range(count)]
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for rows, columns in shapes:
        drawn = torch.stack([torch.rand(rows + 1, columns, generator=g) for g in generators])
        drawn = (2 * drawn - 1) / math.sqrt(rows)
        weights.append(nn.Parameter(drawn[:, :rows].clone()))
        biases.append(nn.Parameter(drawn[:, rows:].clone()))
    return weights, biases
