"""Recovery of a distribution of triggers: sub-generators that make images look alike to an encoder.

Each of n sub-generators turns noise into patterns. Stamped on clean images they should give features whose
mean pairwise cosine reaches the sub-generator's own threshold; beyond it only the information that a pattern
carries about its noise is raised, which keeps the patterns diverse (SSLDefender Eq. 5, after MESA, Qiao et
al. 2019). All sub-generators and all statistics networks are one computation per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.folding import fast_frozen
from encoderguard.generators import Bound, StatisticsNetworks, SubGenerators
from encoderguard.images import ImageSet
from encoderguard.methods import History, require_images
from encoderguard.mixing import Mix, Mixing, enlarged
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.training import Batch, Plan, train
from encoderguard.triggers import MaskedPattern

__all__ = ["RecoveredTriggers", "RecoveryPlan", "Stamp", "Turns", "alternating", "hinge", "recover"]

Turns = Literal["image", "batch"]
Stamp = Callable[[Tensor, torch.Generator], Tensor]
"""Stamps triggers on ``[N, 3, H, W]`` with draws from a CPU generator; a Trigger is one."""
_DRAWS = 32
"""Patterns per sub-generator and step from which information is measured."""
_BLUR = 0.1
"""Standard deviation of noise on a pattern whose information is measured (MESA); else it is infinite."""


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """How triggers are recovered."""

    thresholds: tuple[float, ...]
    """epsilon: the mean cosine that each sub-generator aims at; as many as sub-generators."""
    level: float = 0.0
    """The cosine that counts as 0; 1 stays 1. That of clean images says how far they are from alike."""
    steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    mix: Mix = "patch"
    """``patch``: a square at a random place of each image; ``mask``: a learnt mask, kept small."""
    patch: float = 0.25
    """Side of the square over the image's smaller side."""
    size: float = 0.3
    """Weight of a mask's mean."""
    information: float = 0.1
    """eta, the weight of the mutual information."""
    bound: Bound = "dv"


@dataclass(frozen=True)
class RecoveredTriggers:
    """A distribution of triggers: fresh ones at every call."""

    generators: SubGenerators
    mixing: Mixing
    history: History
    thresholds: tuple[float, ...]
    """Mean cosine that each sub-generator aimed at."""
    information: tuple[float, ...]
    """The bound of each sub-generator on fresh noise; 0 without statistics networks."""

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator, only: int | None = None) -> Tensor:
        """Stamp a fresh trigger on each of ``images [N, 3, H, W]``.

        Args:
            images: in [0, 1], of the size that the triggers were recovered for.
            generator: CPU generator of noise and places.
            only: the sub-generator to take; by default all take turns.
        """
        n, count = len(images), self.generators.count
        patterns = self.generators(self.generators.draw(-(-n // count) if only is None else n, generator))
        if only is None:
            which = torch.arange(n, device=images.device) % count
            chosen = patterns.transpose(0, 1).flatten(0, 1)[:n]
        else:
            which = torch.full((n,), only, device=images.device)
            chosen = patterns[only]
        stamped: Tensor = self.mixing(images, chosen, which, generator)
        return stamped

    def stamp(self, turns: Turns) -> Stamp:
        """What stamps a batch of unlearning."""

        def drawn(images: Tensor, generator: torch.Generator) -> Tensor:
            only = int(torch.randint(self.generators.count, (), generator=generator))
            return self(images, generator, only=only)

        return self if turns == "image" else drawn

    def parts(self) -> list[tuple[dict[str, float], Stamp]]:
        """Of each sub-generator: threshold, size and information, and what stamps its triggers."""
        rows = zip(self.thresholds, self.sizes(), self.information, strict=True)
        return [
            ({"threshold": aim, "size": size, "information": nats}, partial(self.__call__, only=i))
            for i, (aim, size, nats) in enumerate(rows)
        ]

    @torch.no_grad()
    def example(self, index: int, rng: Rng) -> MaskedPattern:
        """One trigger of a sub-generator; a patch stands in the middle."""
        generator = rng.generator("example", index)
        pattern = self.generators(self.generators.draw(1, generator))[index]
        mask = torch.zeros(self.mixing.shape)
        if self.mixing.mix == "mask":
            mask, full = self.mixing.masks[index].cpu(), enlarged(pattern, self.mixing.shape)[0].cpu()
            return MaskedPattern(mask, full)
        side = self.mixing.side
        top, left = ((length - side) // 2 for length in self.mixing.shape)
        mask[top : top + side, left : left + side] = 1
        full = torch.zeros(3, *self.mixing.shape)
        full[:, top : top + side, left : left + side] = enlarged(pattern, (side, side))[0].cpu()
        return MaskedPattern(mask, full)

    @torch.no_grad()
    def sizes(self) -> list[float]:
        """Share of an image that each sub-generator's triggers replace, in [0, 1]."""
        if self.mixing.mix == "mask":
            return [float(size) for size in self.mixing.masks.mean((1, 2))]
        height, width = self.mixing.shape
        return [self.mixing.side**2 / (height * width)] * self.generators.count


def alternating(stamps: Sequence[Stamp]) -> Stamp:
    """Takes ``stamps`` in turns from image to image."""
    if len(stamps) == 1:
        return stamps[0]

    def stamp(images: Tensor, generator: torch.Generator) -> Tensor:
        stamped = torch.empty_like(images)
        for number, each in enumerate(stamps):
            mine = slice(number, None, len(stamps))
            stamped[mine] = each(images[mine], generator)
        return stamped

    return stamp


def hinge(cosine: Tensor, threshold: Tensor) -> Tensor:
    """``max(0, epsilon - mean cosine)``: falls as stamped images grow alike, and is silent beyond epsilon.

    Eq. 5 prints ``max(0, epsilon - L_cos)`` with ``L_cos = -cos``: that never falls silent and would drive
    the images apart.
    """
    return (threshold - cosine).clamp(min=0)


def recover(encoder: Encoder, images: ImageSet, plan: RecoveryPlan, *, run: Run) -> RecoveredTriggers:
    """Train the sub-generators on clean images against the frozen ``encoder``.

    Args:
        encoder: unchanged.
        images: clean images, at least one batch.
        plan: thresholds, length, mixing.
        run: device, precision, streams, progress, checkpoint.

    Raises:
        ImageError: fewer images than one batch.
        NonFiniteError: the loss became NaN or infinite.
        Stopped: the user asked to stop.
    """
    require_images(images, plan.batch_size, "Trigger recovery")
    count = len(plan.thresholds)
    mixing = Mixing(plan.mix, count, images.shape, run.rng.child("mixing"), patch=plan.patch)
    generators = SubGenerators(count, mixing.size, run.rng.child("generators"))
    values = 3 * mixing.size[0] * mixing.size[1]
    statistics = StatisticsNetworks(
        count, generators.noise, values, run.rng.child("statistics"), bound=plan.bound
    )
    model = nn.ModuleDict({"generators": generators, "statistics": statistics, "mixing": mixing})
    model = model.to(run.device)
    fast, _ = fast_frozen(encoder, images.take(torch.arange(min(8, len(images)))).float() / 255, run)
    aims, room = torch.tensor(plan.thresholds, device=run.device), max(1 - plan.level, 1e-3)

    def loss(batch: Batch) -> dict[str, Tensor]:
        mixing.awaken()
        noise = generators.draw(_DRAWS, batch.rng.generator("noise"))
        patterns = generators(noise)
        cosine = _cosines(fast, batch, patterns[:, 0], mixing)
        terms = {"collapse": hinge((cosine - plan.level) / room, aims).sum()}
        if mixing.mix == "mask":
            terms["size"] = plan.size * mixing.masks.mean((1, 2)).sum()
        values = mixing.shown(patterns)
        return terms | _information(statistics, noise, values, plan.information, batch.rng)

    history = train(
        model, loss, images, plan=_schedule(plan, len(images)), run=run, task="recovering triggers"
    )
    model.requires_grad_(False)
    reached = tuple(plan.level + (1 - plan.level) * share for share in plan.thresholds)
    return RecoveredTriggers(
        generators,
        mixing,
        history,
        reached,
        _final(generators, statistics, mixing, plan.information, run.rng),
    )


def _cosines(encoder: Encoder, batch: Batch, patterns: Tensor, mixing: Mixing) -> Tensor:
    """Mean pairwise cosine ``[n]`` of the batch under one pattern ``[n, 3, h, w]`` of each sub-generator."""
    n, count = len(batch.images), len(patterns)
    which = torch.arange(count, device=batch.images.device).repeat_interleave(n)
    stamped = mixing(
        batch.images.repeat(count, 1, 1, 1), patterns[which], which, batch.rng.generator("places")
    )
    features: Tensor = encoder(stamped)
    return mean_pairwise_cosine(features.float().view(count, n, -1))


def _information(
    statistics: StatisticsNetworks, noise: Tensor, values: Tensor, weight: float, rng: Rng
) -> dict[str, Tensor]:
    """The regulariser of the generators, and the loss of the statistics networks."""
    if weight == 0:
        return {}
    noise, values = _pairs(noise, values, rng)
    other = noise.roll(1, 1)
    return {
        "information": -weight * statistics.information(noise, values, other).sum(),
        "statistics": statistics.loss(noise, values, other).sum(),
    }


@torch.no_grad()
def _final(
    generators: SubGenerators, statistics: StatisticsNetworks, mixing: Mixing, weight: float, rng: Rng
) -> tuple[float, ...]:
    if weight == 0:  # the networks are untrained
        return (0.0,) * generators.count
    noise = generators.draw(256, rng.generator("final noise"))
    noise, values = _pairs(noise, mixing.shown(generators(noise)), rng.child("final"))
    return tuple(float(value) for value in statistics.information(noise, values, noise.roll(1, 1)))


def _pairs(noise: Tensor, values: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
    """Noise and values as a statistics network takes them: centred, the values blurred."""
    blur = torch.randn(values.shape, generator=rng.generator("blur")).to(values)
    return 2 * noise - 1, values + _BLUR * blur


def _schedule(plan: RecoveryPlan, images: int) -> Plan:
    epochs = -(-plan.steps // (images // plan.batch_size))
    return Plan(epochs=epochs, batch_size=plan.batch_size, lr=plan.lr, schedule="cosine")
