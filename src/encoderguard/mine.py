"""MINE (Belghazi et al. 2018): a neural lower bound on mutual information, in sample and held out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.random import Rng

__all__ = ["donsker_varadhan", "mine", "statistic", "statistics_weights"]


def mine(
    h: Tensor,
    z: Tensor,
    *,
    rng: Rng,
    epochs: int = 200,
    hidden: int = 512,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    hold_out: bool = True,
    ema: float = 0.01,
) -> tuple[float, float]:
    """MINE (Belghazi et al. 2018): the Donsker-Varadhan bound on I(h; z) in nats, in sample and held out.

    The gradient of the log term uses a moving average of its argument (their Eq. 12), which plain
    mini-batches bias.

    Args:
        h: ``[N, A]``.
        z: ``[N, B]``, paired with h.
        rng: halves, initialisation, batches, marginal permutations.
        epochs: passes over the fitted part.
        hidden: width of the statistics network's two hidden layers (512 in MIMIC).
        batch_size: pairs per step, at most half the fitted part.
        lr: Adam's learning rate (1e-3 in MIMIC).
        weight_decay: Adam's weight decay (1e-5 in MIMIC).
        hold_out: fit on half only; else fit on all, and the held-out value is NaN.
        ema: rate of the moving average.

    Returns:
        The bound averaged over the last tenth of the steps (in sample), and its value on the held-out half.
    """
    order = rng.permutation(len(h), "halves")
    fit, rest = order.chunk(2) if hold_out else (order, order[:0])
    size = min(batch_size, max(2, len(fit) // 2))
    weights = statistics_weights(h.shape[1] + z.shape[1], hidden, rng)
    optimizer = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay, fused=True)
    average, values = None, []
    for epoch in range(epochs):
        for batch in torch.split(fit[rng.permutation(len(fit), "order", epoch)], size):
            if len(batch) < size:
                continue
            other = batch[rng.permutation(size, "marginal", epoch, int(batch[0]))]
            joint, marginal = statistic(weights, h[batch], z[batch]), statistic(weights, h[batch], z[other])
            log_mean = torch.logsumexp(marginal, 0) - math.log(size)
            current = log_mean.detach().exp()
            average = current if average is None else (1 - ema) * average + ema * current
            loss = (log_mean.exp() / average.clamp(min=1e-12)) - joint.mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            values.append(float((joint.mean() - log_mean).detach()))
    tail = values[-max(1, len(values) // 10) :]
    train = sum(tail) / len(tail)
    return train, _bound(weights, h[rest], z[rest], rng) if hold_out else float("nan")


@torch.no_grad()
def _bound(weights: Sequence[Tensor], h: Tensor, z: Tensor, rng: Rng, shuffles: int = 8) -> float:
    joint = statistic(weights, h, z)
    marginal = torch.cat(
        [statistic(weights, h, z[rng.permutation(len(z), "held-out marginal", s)]) for s in range(shuffles)]
    )
    return float(donsker_varadhan(joint, marginal))


def donsker_varadhan(joint: Tensor, marginal: Tensor) -> Tensor:
    """``E[T(h, z)] - log E[exp T(h, z')]``, a lower bound on I(h; z) in nats.

    Args:
        joint: ``[N]``, the statistic of pairs.
        marginal: ``[M]``, the statistic of h with the z of others.
    """
    return joint.mean() - (torch.logsumexp(marginal, 0) - math.log(len(marginal)))


def statistics_weights(inputs: int, hidden: int, rng: Rng) -> list[Tensor]:
    """Weights and biases of MIMIC's statistics network: inputs - hidden - hidden - 1, ReLU between."""
    generator = rng.generator("statistics network")
    weights = []
    for rows, columns in ((hidden, inputs), (hidden, hidden), (1, hidden)):
        bound = 1 / math.sqrt(columns)
        weights += [
            ((2 * torch.rand(rows, columns, generator=generator) - 1) * bound).requires_grad_(),
            ((2 * torch.rand(rows, generator=generator) - 1) * bound).requires_grad_(),
        ]
    return weights


def statistic(weights: Sequence[Tensor], h: Tensor, z: Tensor) -> Tensor:
    """T(h, z), ``[N]``, of ``h [N, A]`` and ``z [N, B]``."""
    x = torch.cat([h, z], 1)
    x = F.relu(F.linear(x, weights[0], weights[1]))
    x = F.relu(F.linear(x, weights[2], weights[3]))
    return F.linear(x, weights[4], weights[5]).squeeze(1)
