"""The smallest trigger that has an effect on an encoder, verified on all images: collapse, or one answer.

The effect is either that all stamped images look alike (DECREE, no classes needed) or that a head on the
features gives them one answer (Neural Cleanse).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.feature_heads import Head
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.inversion import Candidate, Objective, SearchPlan, invert
from encoderguard.penalty import LambdaRule
from encoderguard.recovery import Stamp
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine, standardise
from encoderguard.triggers import MaskedPattern

__all__ = [
    "AnswerPlan",
    "CollapsePlan",
    "Effect",
    "Smallest",
    "answer_loss",
    "random_stamp",
    "smallest_collapse",
    "smallest_per_answer",
]

Effect = Callable[[Tensor], float]
"""Measures features ``[N, D]`` of stamped images: 1 is the full effect."""
_KEEP, _SPACING = 8, 0.85
"""Candidates per restart, and the factor between the sizes of neighbouring ones."""
_POWERS = (0.8, 0.6, 0.4)
"""Of the largest mask, tried one after another if no candidate holds on all images."""


@dataclass(frozen=True, kw_only=True)
class CollapsePlan:
    """How to look for a trigger that makes all images look alike."""

    beta: float
    """Mean cosine of stamped images above which a trigger counts."""
    restarts: int
    steps: int
    batch_size: int
    standardised: bool
    """Take cosines of features standardised over the clean images, not of raw ones."""


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """How to look for a trigger that makes a head give one answer."""

    success: float
    """Share of all images that must get the answer."""
    steps: int
    batch_size: int
    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Smallest:
    """The smallest trigger that holds on all images."""

    trigger: MaskedPattern | None
    """None if none does."""
    size: float | None
    """The mean of its mask."""
    value: float | None
    """The effect on all images, or the largest of those that failed; None if nothing could be tried."""
    effect: Effect


def answer_loss(head: Head, wanted: Sequence[int]) -> Objective:
    """Objective whose r-th value is the share of images that do *not* get answer ``wanted[r]``.

    Its gradient is that of the cross-entropy: a share has none of its own.
    """

    def loss(features: Tensor) -> Tensor:
        scores = head(features)  # [R, B, K]
        index = torch.tensor(wanted, device=scores.device)
        own = scores.log_softmax(-1)[torch.arange(len(wanted), device=scores.device), :, index]
        entropy = -own.mean(1)
        missed = (scores.argmax(-1) != index[:, None]).float().mean(1)
        return entropy + (missed - entropy).detach()

    return loss


def smallest_per_answer(
    encoder: Encoder, images: ImageSet, head: Head, wanted: Sequence[int], plan: AnswerPlan, *, run: Run
) -> list[Smallest]:
    """For each wanted answer the smallest trigger that makes the head give it; searched as one batch.

    Neural Cleanse (Wang et al. 2019, Eq. 3); what counts is the share of all images, in float32.

    Args:
        encoder: unchanged.
        images: clean; no labels are looked at.
        head: on the encoder's features.
        wanted: answers.
        plan: see AnswerPlan.
        run: surroundings.

    Raises:
        ImageError: fewer than two images.
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    search = SearchPlan(
        goal=1 - plan.success + 1e-6,
        restarts=len(wanted),
        batch_sizes=((0, plan.batch_size),),
        max_steps=plan.steps,
        learning_rates=((0, plan.learning_rate),),
        penalty=LambdaRule(initial=1e-3, factor=2.0),
        stale_steps=plan.steps,  # nobody leaves early: restart r is wanted[r] throughout
        keep=_KEEP,
        spacing=_SPACING,
    )
    found = invert(encoder, images, answer_loss(head, wanted), search, run=run)
    return [
        _first_that_holds(kept, encoder, images, _share_of(head, answer), plan.success, run)
        for answer, kept in zip(wanted, found.candidates, strict=True)
    ]


def smallest_collapse(encoder: Encoder, images: ImageSet, plan: CollapsePlan, *, run: Run) -> Smallest:
    """The smallest trigger under which all images look alike (DECREE, Eq. 5), verified in float32.

    Args:
        encoder: unchanged.
        images: clean; no labels are looked at.
        plan: see CollapsePlan.
        run: surroundings.

    Raises:
        SettingError: clean images look alike already, so that any trigger would do.
        ImageError: fewer than two images.
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    clean = extract(encoder, images, run=replace(run, precision="float32")).to(run.device)

    def cosine(features: Tensor) -> Tensor:
        there = features.to(clean.device)
        return mean_pairwise_cosine(standardise(there, clean) if plan.standardised else there)

    rest = float(cosine(clean))
    if rest > plan.beta:
        raise SettingError(
            f"Features of clean images have a mean cosine of {rest:.3f}, above beta {plan.beta:g}, so every "
            "trigger would count; take feature_space=standardised."
        )
    epoch = max(1, len(images) // plan.batch_size)
    search = SearchPlan(
        goal=-(plan.beta + 0.2 * (1 - plan.beta)),  # the best of many batches flatters
        restarts=plan.restarts,
        batch_sizes=((0, plan.batch_size),),
        max_steps=plan.steps,
        learning_rates=((0, 0.5), (30 * epoch, 0.1), (50 * epoch, 0.05)),
        keep=_KEEP,
        spacing=_SPACING,
    )
    found = invert(encoder, images, lambda features: -cosine(features), search, run=run)
    queue = sorted((c for kept in found.candidates for c in kept), key=lambda c: c.size)
    return _first_that_holds(queue, encoder, images, lambda z: float(cosine(z)), plan.beta, run)


def random_stamp(triggers: Sequence[MaskedPattern], share: float = 1.0) -> Stamp:
    """Stamps one of ``triggers``, drawn for every image, on a ``share`` of the images; the others stay."""

    def stamp(images: Tensor, generator: torch.Generator) -> Tensor:
        draws = torch.rand(len(images), generator=generator)
        which = torch.randint(len(triggers), (len(images),), generator=generator)
        which[draws >= share] = -1
        result = images.clone()
        for number, trigger in enumerate(triggers):
            chosen = (which == number).nonzero().flatten().to(images.device)
            if len(chosen):
                result[chosen] = trigger(images[chosen])
        return result

    return stamp


def _share_of(head: Head, answer: int) -> Effect:
    return lambda features: float((head(features).argmax(-1) == answer).double().mean())


def _first_that_holds(
    queue: Sequence[Candidate[MaskedPattern]],
    encoder: Encoder,
    images: ImageSet,
    effect: Effect,
    least: float,
    run: Run,
) -> Smallest:
    """The first of the candidates, small to large and then fuller, that has the effect on all images."""
    triggers, failed = [candidate.trigger for candidate in queue], list[float]()
    triggers += [replace(triggers[-1], mask=triggers[-1].mask ** power) for power in _POWERS if triggers]
    for trigger in triggers:
        features = extract(encoder, images, run=replace(run, precision="float32"), trigger=trigger)
        failed.append(value := effect(features))
        if value >= least:
            return Smallest(
                trigger=trigger, size=float(trigger.mask.double().mean()), value=value, effect=effect
            )
    return Smallest(trigger=None, size=None, value=max(failed, default=None), effect=effect)
