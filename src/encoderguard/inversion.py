"""The trigger-inversion engine: R restarts, optimised as one batch.

A parametrisation says what is free, usually a mask and a pattern that replace pixels; an objective says what
features of stamped images should look like; the engine looks for the smallest trigger that meets it. It runs
on frozen weights, in low precision where that pays, so a verdict needs a measurement in float32.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import NonFiniteError
from encoderguard.folding import fast_frozen
from encoderguard.images import ImageSet
from encoderguard.methods import History, require_images
from encoderguard.parametrisations import MaskAndPattern, Parametrisation, Tensors, stacked, start_all
from encoderguard.penalty import LambdaController, LambdaRule
from encoderguard.run import Run
from encoderguard.triggers import MaskedPattern, Trigger

__all__ = ["Candidate", "Inversion", "Objective", "SearchPlan", "invert", "invert_kind"]

T = TypeVar("T")
TriggerT = TypeVar("TriggerT", bound=Trigger)
Objective = Callable[[Tensor], Tensor]
"""Maps float32 features ``[R, B, D]`` of stamped images to a loss ``[R]``, each from its own slice."""
Outcome = Literal["converged", "dropped", "budget"]
"""Why a restart ended: the stop rule, a rung at which others were better, or the step or time budget."""


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What the engine needs besides encoder, images and objective."""

    goal: float
    """A step succeeds when its loss is below this."""
    restarts: int = 3
    batch_sizes: tuple[tuple[int, int], ...] = ((0, 128),)
    """(first step, images per step), ascending; the same images for all restarts. None converges before the
    last size is reached."""
    max_steps: int = 2000
    seconds: float | None = None
    """Wall-clock budget; the best so far is returned. Results then depend on the machine's speed."""
    learning_rates: tuple[tuple[int, float], ...] = ((0, 0.5), (210, 0.1), (350, 0.05))
    """(first step, learning rate), ascending."""
    betas: tuple[float, float] = (0.5, 0.9)
    penalty: LambdaRule = field(default_factory=LambdaRule)
    round_steps: int | None = None
    """Steps between two looks at stop rule and rungs; None is one pass over the images."""
    stale_steps: int = 10
    """A restart converges after a round of mean loss below ``goal`` if it has not improved for more steps."""
    least_gain: float = 0.0
    """Relative decrease of the smallest mask that counts as an improvement for ``stale_steps``."""
    rungs: tuple[int, ...] = ()
    """Steps after which the worse half of the running restarts is dropped (successive halving)."""
    keep: int = 32
    """Candidates kept per restart."""
    spacing: float = 0.95
    """Factor between sizes of neighbouring kept candidates: if one fails later, a larger one is at hand."""


@dataclass(frozen=True, kw_only=True)
class Candidate(Generic[TriggerT]):
    """A trigger that met the goal on one batch."""

    restart: int
    step: int
    size: float
    """In [0, 1]; of a mask and pattern the mean of the mask: DECREE's PL1 norm."""
    loss: float
    trigger: TriggerT


@dataclass(frozen=True, kw_only=True)
class Inversion(Generic[TriggerT]):
    """What a search found; per restart the candidates run from the smallest mask to larger ones."""

    candidates: tuple[tuple[Candidate[TriggerT], ...], ...]
    steps: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    history: History
    """Per round: mean loss and smallest successful mask of each restart (1.0 before the first success)."""
    image_passes: int
    """Images sent through the encoder, forward and backward."""
    folded: bool
    """Whether BatchNorm was folded into the convolutions."""


class _Restarts(Generic[TriggerT]):
    """The state of all restarts: parameters, lambdas, best candidates, who still runs."""

    def __init__(
        self, kind: Parametrisation[TriggerT], plan: SearchPlan, size: tuple[int, int], run: Run
    ) -> None:
        self.kind, self.plan = kind, plan
        self.active = list(range(plan.restarts))
        self.raws = start_all(kind, plan.restarts, size, run)
        free = [part for raw in self.raws for part in raw[: kind.free]]
        self.optimizer = torch.optim.Adam(free, lr=1.0, betas=plan.betas)
        self.penalty = LambdaController(plan.penalty, plan.restarts)
        self.candidates: list[list[Candidate[TriggerT]]] = [[] for _ in self.active]
        self.reference = [float("inf")] * plan.restarts
        self.stale, self.steps = [0] * plan.restarts, [0] * plan.restarts
        self.losses: list[list[float]] = [[] for _ in self.active]
        self.outcomes: list[Outcome] = ["budget"] * plan.restarts
        self.history: History = {f"{kind}/{r}": [] for kind in ("loss", "size") for r in self.active}
        self.image_passes = 0

    def smallest(self, r: int) -> float:
        return self.candidates[r][0].size if self.candidates[r] else 1.0

    def step(self, number: int, images: Tensor, encoder: Encoder, objective: Objective, run: Run) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = _at(number, self.plan.learning_rates)
        values = self.kind.decode(stacked([self.raws[r] for r in self.active]))
        stamped = self.kind.stamp(images, values)
        with run.autocast():
            features = encoder(stamped.flatten(0, 1))
        loss = objective(features.float().unflatten(0, stamped.shape[:2]))
        which = torch.tensor(self.active)
        total = loss + self.penalty.value[which].to(loss) * self.kind.cost(values)
        self.optimizer.zero_grad(set_to_none=True)
        total.sum().backward()  # type: ignore[no-untyped-call]
        self._record(number, tuple(part.detach() for part in values), loss.detach(), which)
        self.optimizer.step()
        self.image_passes += stamped.shape[0] * stamped.shape[1]

    def _record(self, number: int, values: Tensors, loss: Tensor, which: Tensor) -> None:
        """Note who succeeded, before the parameters that did so change."""
        losses, sizes = torch.stack([loss, self.kind.size(values)]).cpu()
        if not bool(losses.isfinite().all()):
            raise NonFiniteError(f"The loss of the trigger search became NaN or infinite at step {number}.")
        success = losses < self.plan.goal
        self.penalty.update(which, success)
        for i, r in enumerate(self.active):
            self.steps[r], self.stale[r] = number + 1, self.stale[r] + 1
            self.losses[r].append(float(losses[i]))
            if bool(success[i]) and float(sizes[i]) < self.smallest(r):
                trigger = self.kind.trigger(tuple(part[i] for part in values))
                self._keep(
                    Candidate(
                        restart=r, step=number, size=float(sizes[i]), loss=float(losses[i]), trigger=trigger
                    )
                )

    def _keep(self, found: Candidate[TriggerT]) -> None:
        r, kept = found.restart, self.candidates[found.restart]
        if found.size < self.reference[r] * (1 - self.plan.least_gain):
            self.reference[r], self.stale[r] = found.size, 0
        # the newest is the smallest; the one before stays only if it is clearly smaller than its predecessor
        if len(kept) > 1 and kept[0].size > self.plan.spacing * kept[1].size:
            kept.pop(0)
        kept.insert(0, found)
        del kept[self.plan.keep :]

    def end_round(self, number: int) -> None:
        """Apply the stop rule and the rungs; ``number`` steps are done."""
        before = number - len(self.losses[self.active[0]])
        means = {r: sum(self.losses[r]) / len(self.losses[r]) for r in self.active}
        for r, mean in means.items():
            self.history[f"loss/{r}"].append(mean)
            self.history[f"size/{r}"].append(self.smallest(r))
            settled = before >= self.plan.batch_sizes[-1][0] and self.stale[r] > self.plan.stale_steps
            self.losses[r].clear()
            if settled and mean < self.plan.goal:
                self._end(r, "converged")
        for _ in range(sum(before < rung <= number for rung in self.plan.rungs)):
            order = sorted(self.active, key=lambda r: (self.smallest(r), means[r]))
            for r in order[(len(order) + 1) // 2 :]:
                self._end(r, "dropped")

    def _end(self, r: int, outcome: Outcome) -> None:
        self.active.remove(r)
        self.outcomes[r] = outcome


def invert(
    encoder: Encoder, images: ImageSet, objective: Objective, plan: SearchPlan, *, run: Run
) -> Inversion[MaskedPattern]:
    """``invert_kind`` for a free mask and pattern."""
    return invert_kind(encoder, images, objective, plan, MaskAndPattern(), run=run)


def invert_kind(
    encoder: Encoder,
    images: ImageSet,
    objective: Objective,
    plan: SearchPlan,
    kind: Parametrisation[TriggerT],
    *,
    run: Run,
) -> Inversion[TriggerT]:
    """Search for the smallest trigger whose stamped images meet the objective; the best so far within budget.

    Args:
        encoder: unchanged.
        images: clean images; all are held in memory as uint8. An incomplete last batch of a pass is left out.
        objective: see ``Objective``.
        plan: budgets, schedule, stop rule.
        kind: what is free.
        run: device, precision, streams, progress.

    Raises:
        ImageError: fewer than two images.
        NonFiniteError: the loss became NaN or infinite.
        Stopped: the user asked to stop.
    """
    require_images(images, 2, "The trigger search")
    pixels = images.take(torch.arange(len(images))).to(run.device)
    fast, folded = fast_frozen(encoder, pixels[:8].float() / 255, run)
    state = _Restarts(kind, plan, (pixels.shape[-2], pixels.shape[-1]), run)
    deadline = time.monotonic() + plan.seconds if plan.seconds is not None else float("inf")
    sizes = tuple((first, min(size, len(pixels))) for first, size in plan.batch_sizes)
    rounds = plan.round_steps or len(pixels) // sizes[0][1]
    for number, batch in zip(range(plan.max_steps), _batches(pixels, sizes, run), strict=False):
        run.check_stop()
        state.step(number, batch, fast, objective, run)
        if (number + 1) % rounds == 0:
            state.end_round(number + 1)
            best = min(map(state.smallest, range(plan.restarts)))
            run.progress(
                "invert", number + 1, plan.max_steps, f"mask {best:.4f}, {len(state.active)} running"
            )
        if not state.active or time.monotonic() > deadline:
            break
    return Inversion(
        candidates=tuple(map(tuple, state.candidates)),
        steps=tuple(state.steps),
        outcomes=tuple(state.outcomes),
        history=state.history,
        image_passes=state.image_passes,
        folded=folded,
    )


def _batches(pixels: Tensor, sizes: tuple[tuple[int, int], ...], run: Run) -> Iterator[Tensor]:
    """Endless full float batches, in a new order each pass over the images."""
    number = 0
    for epoch in itertools.count():
        order, first = run.rng.permutation(len(pixels), "order", epoch).to(pixels.device), 0
        while first + (size := _at(number, sizes)) <= len(pixels):
            yield pixels[order[first : first + size]].float() / 255
            number, first = number + 1, first + size


def _at(number: int, steps: tuple[tuple[int, T], ...]) -> T:
    """The value of the last entry whose first step is not after ``number``."""
    return [value for first, value in steps if first <= number][-1]
