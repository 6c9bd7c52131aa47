"""Repair by training on clean images under the gate of ``repair``: what the fine-tuning baselines share."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.errors import NonFiniteError
from encoderguard.hidden import Units
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.methods import History
from encoderguard.pruning import masked
from encoderguard.repair import Contrast, Gate, Repair
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["FineTuning", "Kept", "Loss", "Step", "Tuned", "fine_tune", "tune"]


@dataclass(frozen=True)
class Step:
    """What a loss sees: two views of each image of the batch, the first views before the second."""

    views: Tensor
    """float32 ``[2 B, 3, H, W]``."""
    features: Tensor
    """``[2 B, D]`` of the encoder that is trained."""
    stages: list[Tensor]
    """K maps ``[2 B, C_k, H_k, W_k]``."""


Loss = Callable[[Step], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a training under the gate gives."""

    encoder: Encoder
    """Of the last epoch above the floor, in eval mode."""
    history: History
    """Terms of the loss and ``utility`` per epoch."""
    epochs: int
    """Epochs that are in ``encoder``."""
    utility: float
    """Of ``encoder``."""
    fallback: str | None
    """Why it is not the encoder of the last planned epoch, in one sentence."""
    lr: float
    """Peak learning rate."""
    harder: tuple[str, ...] = ()
    """Why trainings at larger rates, before this one, did not count."""

    def evidence(self, gate: Gate, before: float = 1.0) -> dict[str, Any]:
        """The same as JSON values; ``before`` is the utility of what the training started from."""
        return {
            "utility_before": before,
            "utility_after": self.utility,
            "utility_floor": gate.floor,
            "held_out": gate.count,
            "epochs_used": self.epochs,
            "fallback": self.fallback,
            "lr": self.lr,
            "harder": list(self.harder),
        }


class Kept(nn.Module):
    """The last encoder above the floor; part of what is trained, so that a checkpoint holds it."""

    epochs: Tensor
    utility: Tensor

    def __init__(self, start: Encoder, utility: float) -> None:
        super().__init__()
        self.encoder = start.frozen()
        self.register_buffer("epochs", torch.tensor(0))
        self.register_buffer("utility", torch.tensor(utility))

    def keep(self, encoder: Encoder, epochs: int, utility: float) -> None:
        """Take over the weights that ``encoder`` has after so many epochs."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.epochs.fill_(epochs)
        self.utility.fill_(utility)


def tune(
    start: Encoder,
    loss: Loss,
    images: ImageSet,
    gate: Gate,
    *,
    plan: Plan,
    run: Run,
    task: str,
    parts: Mapping[str, nn.Module] | None = None,
    masks: Mapping[Units, Tensor] | None = None,
) -> Tuned:
    """Train a copy of ``start``; the last epoch above the floor counts.

    Utility often dips while the learning rate is high and comes back as that falls, so a dip ends nothing;
    more than half of the planned epochs below the floor in a row do.

    Args:
        start: unchanged; on the run's device.
        loss: terms of one step.
        images: clean.
        gate: measures after each epoch.
        plan: length, optimiser and schedule.
        run: surroundings.
        task: shown beside the progress; begins the sentence of a fallback.
        parts: other modules that are trained or must be in the checkpoint, by name.
        masks: channels of hidden layers that stay out.

    Raises:
        ImageError: fewer images than one batch.
        Stopped: the user asked to stop.
    """
    student = start.clone().requires_grad_(True)
    kept = Kept(start, gate.measure(start)).to(run.device)
    model = nn.ModuleDict({"encoder": student, "kept": kept, **(parts or {})})

    def terms(batch: Batch) -> dict[str, Tensor]:
        views = torch.cat(batch.views(SIMCLR))
        return loss(Step(views, *student.features_and_stages(views)))

    def monitor(epoch: int) -> dict[str, float]:
        utility = gate.measure(student)
        if utility >= gate.floor:
            kept.keep(student, epoch, utility)
        return {"utility": utility}

    def enough(history: History) -> bool:
        recent = history["utility"][-(plan.epochs // 2 + 1) :]
        return len(recent) > plan.epochs // 2 and max(recent) < gate.floor

    reason, history = None, History()
    with ExitStack() as stack:
        for units, mask in (masks or {}).items():
            stack.enter_context(masked(student, units, mask))
        try:
            history = train(
                model, terms, images, plan=plan, run=run, task=task, monitor=monitor, enough=enough
            )
        except NonFiniteError as error:
            reason = str(error)
    return _tuned(kept, history, reason, gate.floor, plan, task)


def _tuned(kept: Kept, history: History, reason: str | None, floor: float, plan: Plan, task: str) -> Tuned:
    epochs = int(kept.epochs)
    if history and epochs < len(history["utility"]):
        last, done = history["utility"][-1], len(history["utility"])
        told = f"the utility to {last:.3f}, below the floor of {floor:g}"
        told = "the features to NaN or infinity" if last < 0 else told
        reason = f"{task.capitalize()} took {told}, after {done} of {plan.epochs} epochs"
    result = kept.encoder.eval().requires_grad_(True)
    return Tuned(
        encoder=result,
        history=history,
        epochs=epochs,
        utility=round(float(kept.utility), 6),
        fallback=None if reason is None else f"{reason.rstrip('.')}; {_returned(epochs)}",
        lr=plan.lr,
    )


def _returned(epochs: int) -> str:
    if epochs == 0:
        return "the encoder that it started from is returned, without any of this training."
    return f"the encoder after epoch {epochs} is returned."


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Fine-tuning with the contrastive loss, and what else may stand beside it."""

    plan: Plan
    temperature: float = 0.5
    """tau of NT-Xent."""
    warm_up: int = 5
    """Epochs in which only the fresh projection head learns."""
    anchor: float = 0.0
    """Weight of the distance to the suspect's own features of the same views."""
    extra: Loss | None = field(default=None, compare=False)
    """Further terms."""
    gentler: int = 0
    """How often to begin anew at a third of the learning rate where the last epoch does not count."""


def fine_tune(
    start: Encoder,
    repair: Repair,
    how: FineTuning,
    *,
    run: Run,
    task: str = "fine-tuning",
    masks: Mapping[Units, Tensor] | None = None,
) -> Tuned:
    """Contrastive fine-tuning of all layers, BatchNorm statistics included; arguments as for ``tune``.

    A rate that one encoder needs to forget breaks another one: so the largest of ``how.gentler + 1`` rates at
    which the last epoch is above the floor counts; if there is none, the one with the most epochs.
    """
    done = _fine_tuned(start, repair, how, run=run, task=task, masks=masks)
    tried = [done]
    for attempt in range(1, how.gentler + 1):
        if tried[-1].fallback is None:
            break
        how = replace(how, plan=replace(how.plan, lr=how.plan.lr / 3))
        again = run.child("gentler", attempt)
        tried.append(_fine_tuned(start, repair, how, run=again, task=f"{task}, gentler", masks=masks))
    best = max(tried, key=lambda tuned: (tuned.fallback is None, tuned.epochs))
    harder = [tuned.fallback for tuned in tried if tuned.lr > best.lr and tuned.fallback is not None]
    return replace(best, harder=tuple(harder))


def _fine_tuned(
    start: Encoder,
    repair: Repair,
    how: FineTuning,
    *,
    run: Run,
    task: str,
    masks: Mapping[Units, Tensor] | None,
) -> Tuned:
    contrast = Contrast(start, run, temperature=how.temperature)
    if how.warm_up:
        plan = Plan(epochs=how.warm_up, batch_size=how.plan.batch_size, lr=1e-3)
        contrast.warm_up(start, repair.images, plan=plan, run=run)

    def loss(step: Step) -> dict[str, Tensor]:
        terms = {"nt_xent": contrast.of_features(step.features)}
        if how.anchor > 0:
            with torch.no_grad():
                aim = repair.suspect(step.views)
            terms["anchor"] = how.anchor * cosine_distance(step.features, aim)
        return terms | (how.extra(step) if how.extra else {})

    return tune(
        start,
        loss,
        repair.images,
        repair.gate,
        plan=how.plan,
        run=run,
        task=task,
        parts={"contrast": contrast},
        masks=masks,
    )
