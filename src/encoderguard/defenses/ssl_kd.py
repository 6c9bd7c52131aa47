"""SSL-KD (Bie et al. 2024), reimplemented from its abstract: a fine-tuned copy teaches the suspect."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import attention_loss
from encoderguard.methods import Defense, Purified, require_taps
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, begin
from encoderguard.run import Run
from encoderguard.training import Plan
from encoderguard.tuning import FineTuning, Step, fine_tune, tune

__all__ = ["SSLKD", "info_nce", "regression"]


def info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding row i of the teacher among all its rows from row i of the student, by cosine.

    Args:
        student: ``[N, D]``.
        teacher: ``[N, D]``.
        temperature: tau > 0.
    """
    cosines = F.normalize(student.float(), dim=1) @ F.normalize(teacher.float(), dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(cosines), device=cosines.device))


def regression(student: Tensor, teacher: Tensor) -> Tensor:
    """BYOL's term: the mean squared distance of the rows at length 1, that is ``2 - 2 cos``."""
    unit = (F.normalize(rows.float(), dim=1) for rows in (student, teacher))
    first, second = unit
    return (first - second).square().sum(1).mean()


@register
@final
@dataclass(frozen=True, kw_only=True)
class SSLKD(Defense):
    """SSL-KD (reimplementation from the abstract): distillation across views from a fine-tuned teacher.

    No code is published and only the abstract was at hand: it names distillation with contrastive and
    non-contrastive terms on unlabelled images. All else is ours: the teacher is the suspect after
    fine-tuning, the student the suspect itself; the student's features of one view are drawn to the
    teacher's of the other by InfoNCE and BYOL's regression without a predictor, and its attention maps to
    the teacher's as in NAD. Numbers from it say little about the published method.
    """

    name: ClassVar[str] = "ssl_kd"
    paper: ClassVar[str] = "Bie et al. 2024, IEEE TSC (reimplemented from the abstract)"
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "clean unlabelled images, of the downstream task if there are any"
    cost: ClassVar[str] = "two fine-tunings"
    blind_spots: ClassVar[str] = "What the fine-tuned teacher still carries is taught again."

    teacher_epochs: Annotated[int, Field(ge=1)] = 50
    """Passes over the clean images that make the teacher."""
    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the clean images for the student."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """SGD's learning rate for teacher and student; falls to zero along a cosine."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """SGD's weight decay."""
    contrastive: Annotated[float, Field(ge=0)] = 1.0
    """Weight of InfoNCE."""
    non_contrastive: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the regression."""
    attention: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the attention maps of each stage, as sums over places."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """tau of InfoNCE."""
    warm_up: Annotated[int, Field(ge=0)] = 5
    """Epochs in which only the teacher's projection head learns."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch with at least this utility counts, for teacher and student each."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense."""
        require_taps(encoder, "SSL-KD")
        repair = begin(
            encoder, images, batch_size=self.batch_size, floor=self.utility_floor, purpose="SSL-KD", run=run
        )
        how = FineTuning(plan=self._plan(self.teacher_epochs), warm_up=self.warm_up)
        taught = fine_tune(
            repair.suspect, repair, how, run=run.child("teacher"), task="fine-tuning the teacher"
        )
        teacher = taught.encoder.frozen()
        done = tune(
            repair.suspect,
            lambda step: self._terms(step, teacher),
            repair.images,
            repair.gate,
            plan=self._plan(self.epochs),
            run=run,
            task="distilling",
        )
        evidence = done.evidence(repair.gate) | {"teacher": taught.evidence(repair.gate)}
        return Purified(encoder=done.encoder, history=done.history, evidence=evidence)

    def _terms(self, step: Step, teacher: Encoder) -> dict[str, Tensor]:
        with torch.no_grad():
            features, aims = teacher.features_and_stages(step.views)
        crossed = features.roll(len(features) // 2, 0)  # the other view of the same image
        pairs = zip(step.features.chunk(2), crossed.chunk(2), strict=True)
        found = torch.stack([info_nce(own, aim, self.temperature) for own, aim in pairs]).mean()
        maps = [attention_loss(own, aim, reduction="sum") for own, aim in zip(step.stages, aims, strict=True)]
        return {
            "info_nce": self.contrastive * found,
            "regression": self.non_contrastive * regression(step.features, crossed),
            "attention": self.attention * torch.stack(maps).sum(),
        }

    def _plan(self, epochs: int) -> Plan:
        return Plan(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
