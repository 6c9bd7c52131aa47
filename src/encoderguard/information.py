"""How much a stage tells about the final features: MINE as in MIMIC, and steadier measures beside it.

The features are a function of every stage, so the true mutual information is the same for all of them; what
differs is how easily it is read off. Every value therefore comes with what it would be without any dependence
(the same pairs, shuffled) and with its spread over seeds. In-sample MINE is far above zero even for shuffled
pairs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.features import evaluating
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.similarity import debiased_linear_cka
from encoderguard.triggers import Trigger

__all__ = ["Measure", "Profile", "Stage", "gaussian_information", "layer_profile", "layer_weights", "mine"]

Measure = Literal["cka", "mine", "gaussian"]


class Stage(BaseModel):
    """The dependence of one stage on the final features."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tap: str
    """Name of the stage."""
    train: float
    """Value on the images the measure was fitted on (nats for mine and gaussian, 0..1 for cka)."""
    held_out: float
    """Value on images it was not fitted on, mean over seeds."""
    spread: float
    """Standard deviation of ``held_out`` over seeds."""
    null: float
    """Held-out value for shuffled pairs, mean over seeds: what no dependence looks like."""
    null_spread: float
    """Its standard deviation."""


class Profile(BaseModel):
    """One value per stage, shallow to deep (MIMIC Figure 3)."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    measure: Measure
    images: int
    stages: tuple[Stage, ...]

    @property
    def informative(self) -> bool:
        """Whether any stage stands out of its shuffled pairs by three standard deviations."""
        return any(s.held_out > s.null + 3 * (s.null_spread + s.spread) for s in self.stages)


def layer_profile(
    encoder: Encoder,
    images: Tensor,
    *,
    measure: Measure,
    run: Run,
    pool: int = 1,
    seeds: int = 3,
    epochs: int = 30,
    hidden: int = 128,
    hold_out: bool = True,
    trigger: Trigger | None = None,
) -> Profile:
    """The dependence of every stage on the L2-normalised features.

    Args:
        encoder: unchanged.
        images: float ``[N, 3, H, W]`` in [0, 1], N >= 32; half is fitted on, half is held out.
        measure: ``cka`` (debiased linear CKA), ``mine``, or ``gaussian`` (shrunk Gaussian information).
        run: surroundings.
        pool: maps are averaged to at most pool x pool places; 0 flattens them whole, as the authors do.
        seeds: repetitions (halves, initialisations), each with a shuffled twin.
        epochs: passes of MINE over the fitted half.
        hidden: width of MINE's statistics network.
        hold_out: False fits MINE on all images, as the authors do; held-out values are then NaN.
        trigger: stamped first; for reports only, a defense has none.

    Raises:
        SettingError: fewer than 32 images.
    """
    if len(images) < 32:
        raise SettingError(f"A dependence profile needs at least 32 images, found {len(images)}.")
    stamped = images if trigger is None else trigger(images)
    features, maps = _collect(encoder, stamped, pool, run)

    def estimate(h: Tensor, z: Tensor, rng: Rng) -> tuple[float, float]:
        if measure == "mine":
            return mine(h, z, rng=rng, epochs=epochs, hidden=hidden, hold_out=hold_out)
        return _both_halves(
            debiased_linear_cka_value if measure == "cka" else gaussian_information, h, z, rng
        )

    stages = []
    for number, (tap, h) in enumerate(zip(encoder.spec.taps, maps, strict=True)):
        run.progress("dependence profile", number, len(maps))
        run.check_stop()
        stages.append(_stage(tap, h, features, estimate, seeds, run.rng.child("profile", tap)))
    run.progress("dependence profile", len(maps), len(maps))
    return Profile(measure=measure, images=len(images), stages=tuple(stages))


def _stage(
    tap: str,
    h: Tensor,
    z: Tensor,
    estimate: Callable[[Tensor, Tensor, Rng], tuple[float, float]],
    seeds: int,
    rng: Rng,
) -> Stage:
    paired = [estimate(h, z, rng.child("paired", s)) for s in range(seeds)]
    shuffled = [
        estimate(h, z[rng.permutation(len(z), "null", s)], rng.child("shuffled", s))[1] for s in range(seeds)
    ]
    train, held_out = (torch.tensor(v, dtype=torch.float64) for v in zip(*paired, strict=True))
    null = torch.tensor(shuffled, dtype=torch.float64)
    spread = held_out.std().item() if seeds > 1 else 0.0
    null_spread = null.std().item() if seeds > 1 else 0.0
    return Stage(
        tap=tap,
        train=train.mean().item(),
        held_out=held_out.mean().item(),
        spread=spread,
        null=null.mean().item(),
        null_spread=null_spread,
    )


@torch.no_grad()
def _collect(encoder: Encoder, images: Tensor, pool: int, run: Run) -> tuple[Tensor, list[Tensor]]:
    features, maps = [], []
    with evaluating(encoder):
        for batch in torch.split(images, 256):
            with run.autocast():
                z, stages = encoder.features_and_stages(batch.to(run.device))
            features.append(F.normalize(z, dim=1).cpu())
            maps.append([_pooled(stage.float(), pool).cpu() for stage in stages])
    return _standardised(torch.cat(features)), [_standardised(torch.cat(m)) for m in zip(*maps, strict=True)]


def _pooled(stage: Tensor, pool: int) -> Tensor:
    if pool and stage.shape[-1] > pool:
        stage = F.adaptive_avg_pool2d(stage, pool)
    return stage.flatten(1)


def _standardised(x: Tensor) -> Tensor:
    deviation = x.std(0)
    return (x - x.mean(0)) / deviation.clamp(min=1e-6)


def _both_halves(
    value: Callable[[Tensor, Tensor], float], h: Tensor, z: Tensor, rng: Rng
) -> tuple[float, float]:
    order = rng.permutation(len(h), "halves")
    first, second = order.chunk(2)
    return value(h[first], z[first]), value(h[second], z[second])


def debiased_linear_cka_value(h: Tensor, z: Tensor) -> float:
    """``debiased_linear_cka`` as a float."""
    return float(debiased_linear_cka(h, z))


def gaussian_information(h: Tensor, z: Tensor, rank: int = 64) -> float:
    """Mutual information, in nats, of Gaussians with the shrunk covariance of the data's leading components.

    ``-1/2 sum log(1 - rho_i^2)`` over the canonical correlations of both sides' first ``rank`` principal
    components, with Ledoit-Wolf shrinkage. Biased upwards when N is not far above ``2 * rank``; compare with
    shuffled pairs.
    """
    from sklearn.covariance import ledoit_wolf

    sides = []
    for x in (h, z):
        centred = x.double() - x.double().mean(0)
        keep = min(rank, *x.shape)
        left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
        sides.append((left * scale)[:, :keep])
    joint = torch.cat([side / side.std(0).clamp(min=1e-12) for side in sides], 1)
    covariance = torch.from_numpy(ledoit_wolf(joint.numpy())[0])
    split = sides[0].shape[1]
    logdets = [
        torch.logdet(c).item() for c in (covariance[:split, :split], covariance[split:, split:], covariance)
    ]
    return 0.5 * (logdets[0] + logdets[1] - logdets[2])


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
    weights = _statistics_weights(h.shape[1] + z.shape[1], hidden, rng)
    optimizer = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay, fused=True)
    average, values = None, []
    for epoch in range(epochs):
        for batch in torch.split(fit[rng.permutation(len(fit), "order", epoch)], size):
            if len(batch) < size:
                continue
            other = batch[rng.permutation(size, "marginal", epoch, int(batch[0]))]
            joint, marginal = _statistic(weights, h[batch], z[batch]), _statistic(weights, h[batch], z[other])
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
    joint = _statistic(weights, h, z).mean()
    marginal = torch.cat(
        [_statistic(weights, h, z[rng.permutation(len(z), "held-out marginal", s)]) for s in range(shuffles)]
    )
    return float(joint - (torch.logsumexp(marginal, 0) - math.log(len(marginal))))


def _statistics_weights(inputs: int, hidden: int, rng: Rng) -> list[Tensor]:
    generator = rng.generator("statistics network")
    weights = []
    for rows, columns in ((hidden, inputs), (hidden, hidden), (1, hidden)):
        bound = 1 / math.sqrt(columns)
        weights += [
            ((2 * torch.rand(rows, columns, generator=generator) - 1) * bound).requires_grad_(),
            ((2 * torch.rand(rows, generator=generator) - 1) * bound).requires_grad_(),
        ]
    return weights


def _statistic(weights: Sequence[Tensor], h: Tensor, z: Tensor) -> Tensor:
    x = torch.cat([h, z], 1)
    x = F.relu(F.linear(x, weights[0], weights[1]))
    x = F.relu(F.linear(x, weights[2], weights[3]))
    return F.linear(x, weights[4], weights[5]).squeeze(1)


def layer_weights(
    values: Sequence[float],
    weighting: Literal["share", "zscore", "uniform"],
    *,
    alpha0: float,
    alpha1: float,
) -> list[float]:
    """beta, one weight per stage (MIMIC Algorithm 1, line 8, and its variants).

    Args:
        values: the dependence of each stage; negative ones count as 0 for ``share``.
        weighting: ``share``: ``alpha0 + alpha1 m_l / sum m`` (the authors' code); ``zscore``: ``alpha0 +
            alpha1
            (m_l - mean) / std`` as printed, clamped at 0 because a negative weight would distil the opposite;
            ``uniform``: the mean that ``share`` gives, for every stage.
        alpha0: base weight.
        alpha1: weight of the dependence.
    """
    m = torch.tensor(values, dtype=torch.float64)
    k = len(m)
    if weighting == "zscore":
        deviation = m.std(correction=0)
        scores = (m - m.mean()) / deviation if deviation > 0 else torch.zeros(k, dtype=torch.float64)
        return (alpha0 + alpha1 * scores).clamp(min=0).tolist()
    m = m.nan_to_num(0.0).clamp(min=0)
    if weighting == "uniform" or m.sum() <= 0:
        return [alpha0 + alpha1 / k] * k
    beta: list[Any] = (alpha0 + alpha1 * m / m.sum()).tolist()
    return beta
