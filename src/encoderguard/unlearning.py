"""Distillation-guided unlearning (SSLDefender IV-C): forget what triggers do, keep clean features."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance, random_directions, sliced_wasserstein2
from encoderguard.methods import History
from encoderguard.recovery import Stamp
from encoderguard.repair import Contrast, Gate, Repair
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train
from encoderguard.tuning import Kept

__all__ = ["FORGET", "UnlearningLoss", "Unlearnt", "tuned_teacher", "unlearn"]


@dataclass(frozen=True)
class Unlearnt:
    """What unlearning gives."""

    encoder: Encoder
    """In eval mode."""
    history: History
    """Terms of the loss and ``utility`` per epoch."""
    epochs: int
    """Epochs that are in ``encoder``."""
    utility: float
    """Of ``encoder``."""

    def evidence(self, gate: Gate) -> dict[str, Any]:
        """The same as JSON values, in the words of ``tuning.Tuned``."""
        planned, fallback = len(self.history["utility"]), None
        if self.epochs < planned:
            fallback = (
                f"Unlearning took the utility below the floor of {gate.floor:g}: it is "
                f"{self.history['utility'][-1]:.2f} after {planned} epochs; the encoder after epoch "
                f"{self.epochs} is returned."
            )
        return {
            "utility_after": self.utility,
            "utility_floor": gate.floor,
            "held_out": gate.count,
            "epochs_used": self.epochs,
            "fallback": fallback,
        }


@dataclass(frozen=True, kw_only=True)
class UnlearningLoss:
    """``alpha SW(student clean, student stamped) + beta SW(student clean, teacher clean)`` (Eq. 8)."""

    alpha: float
    beta: float
    paired: float = 0.0
    """Weight of the cosine distance to the teacher's features of the same clean image, stamped or not."""
    directions: int = 256
    """M of Eq. 7."""
    root: bool = False
    """Root of the squared distance, as Eq. 7 prints."""

    def __call__(
        self, student: Encoder, goal: Tensor, images: Tensor, stamped: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The weighted terms of one step.

        Args:
            student: in eval mode, so that BatchNorm uses its stored statistics.
            goal: ``[N, D]``, the teacher's features of ``images``.
            images: ``[N, 3, H, W]``.
            stamped: the same with triggers.
            generator: of the directions.
        """
        both = F.normalize(student(torch.cat([images, stamped])), dim=1)
        clean, dirty = both.chunk(2)
        goal = F.normalize(goal, dim=1)
        terms = dict[str, Tensor]()
        if self.alpha > 0 or self.beta > 0:
            directions = random_directions(self.directions, goal.shape[1], generator)
            # clean features are the aim, else they would move towards those of the trigger
            terms["forget (L1)"] = self.alpha * self._distance(dirty, clean.detach(), directions)
            terms["keep (L2)"] = self.beta * self._distance(clean, goal, directions)
        if self.paired > 0:
            terms["paired"] = self.paired * (cosine_distance(dirty, goal) + cosine_distance(clean, goal))
        return terms

    def _distance(self, a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
        squared = sliced_wasserstein2(a, b, directions)
        # the root has no gradient at 0; the small constant keeps equal samples harmless
        return (squared + 1e-12).sqrt() if self.root else squared


FORGET = UnlearningLoss(alpha=0.0, beta=0.0, paired=1.0)
"""Stamped and clean images alike keep the teacher's features of the clean image: for one known trigger."""


def unlearn(
    start: Encoder,
    teacher: Encoder,
    stamp: Stamp,
    repair: Repair,
    *,
    loss: UnlearningLoss,
    plan: Plan,
    views: bool,
    run: Run,
) -> Unlearnt:
    """Fine-tune a copy of ``start``; BatchNorm and dropout stay in eval mode.

    Args:
        start: unchanged.
        teacher: frozen.
        stamp: fresh triggers for every batch.
        repair: the images, and the gate that measures after each epoch.
        loss: the terms.
        plan: length, optimiser, schedule.
        views: take SimCLR views of the images in the place of the images.
        run: surroundings.

    Returns:
        The encoder of the last epoch whose utility is not below the floor.

    Raises:
        ImageError: fewer images than one batch.
        NonFiniteError: the loss became NaN or infinite.
        Stopped: the user asked to stop.
    """
    student, gate = start.clone().to(run.device).requires_grad_(True), repair.gate
    kept = Kept(start.clone().to(run.device), gate.measure(start))
    model = nn.ModuleDict({"student": student, "kept": kept})

    def terms(batch: Batch) -> dict[str, Tensor]:
        seen = batch.views(SIMCLR, 1)[0] if views else batch.images
        with torch.no_grad():
            goal = teacher(seen)
            stamped = stamp(seen, batch.rng.generator("triggers"))
        return loss(student, goal, seen, stamped, batch.rng.generator("directions"))

    def monitor(epoch: int) -> dict[str, float]:
        utility = gate.measure(student)
        if utility >= gate.floor:
            kept.keep(student, epoch, utility)
        return {"utility": utility}

    history = train(
        model,
        terms,
        repair.images,
        plan=plan,
        run=run,
        task="unlearning",
        prepare=student.eval,
        monitor=monitor,
    )
    return Unlearnt(kept.encoder.eval().requires_grad_(True), history, int(kept.epochs), float(kept.utility))


def tuned_teacher(encoder: Encoder, images: ImageSet, *, plan: Plan, run: Run) -> Encoder:
    """A frozen copy of ``encoder``, fine-tuned by SimCLR's loss with BatchNorm in eval mode.

    Args:
        encoder: unchanged.
        images: clean images, at least one batch.
        plan: length, optimiser, schedule.
        run: surroundings.
    """
    teacher = encoder.clone().to(run.device).requires_grad_(True)
    contrast = Contrast(teacher, run)
    model = nn.ModuleDict({"teacher": teacher, "contrast": contrast})

    def prepare() -> None:
        contrast.train()
        teacher.eval()

    def terms(batch: Batch) -> dict[str, Tensor]:
        return {"nt_xent": contrast(teacher, batch)}

    train(model, terms, images, plan=plan, run=run, task="fine-tuning the teacher", prepare=prepare)
    return teacher.frozen()
