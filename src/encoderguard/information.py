"""How much a stage tells about the final features: MINE as in MIMIC, and steadier measures beside it.

The features are a function of every stage, so the true mutual information is the same for all of them; what
differs is how easily it is read off. Every value therefore comes with what it would be without any dependence
(the same pairs, shuffled) and with its spread over seeds. In-sample MINE is far above zero even for shuffled
pairs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.mine import mine
from encoderguard.modules import evaluating
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.similarity import debiased_linear_cka
from encoderguard.triggers import Trigger

__all__ = ["Measure", "Profile", "Stage", "gaussian_information", "layer_profile", "layer_weights"]

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
