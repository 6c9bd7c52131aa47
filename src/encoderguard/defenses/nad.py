"""NAD (Li et al. 2021): a fine-tuned copy teaches the suspect where to look."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.losses import attention_loss
from encoderguard.methods import Defense, Purified, require_taps
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, begin
from encoderguard.run import Run
from encoderguard.training import Plan
from encoderguard.tuning import FineTuning, Loss, Step, fine_tune

__all__ = ["NAD"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class NAD(Defense):
    """The suspect is fine-tuned while its attention maps are drawn to those of a copy fine-tuned before it.

    Loss: NT-Xent + ``sum_l beta_l |A_l(student) - A_l(teacher)|^2`` with the attention maps of Eq. 1
    (``A_sum^2``), normalised. Departs from the paper and its code in the loss beside the attention, which
    needs no labels; in summing the squares over places where the code averages (its 500, 1000, 1000 for
    maps of 32 x 32, 16 x 16 and 8 x 8 places are .5, 4 and 16 as sums, and change with the image size); in
    the learning rate, which was .1 for two epochs and then .01; and in the utility floor. In a ViT the
    patch tokens form the map.
    """

    name: ClassVar[str] = "nad"
    paper: ClassVar[str] = "Li et al. 2021, arXiv:2101.05930"
    year: ClassVar[int] = 2021
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "two fine-tunings"
    blind_spots: ClassVar[str] = (
        "What the fine-tuned teacher still carries is taught again; compare with finetune alone."
    )

    teacher_epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the clean images that make the teacher."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """Passes over the clean images for the student."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """SGD's learning rate for teacher and student; falls to zero along a cosine."""
    gentler: Annotated[int, Field(ge=0, le=9)] = 2
    """How often to begin anew at a third of ``lr`` where the last epoch falls below the floor."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """SGD's weight decay."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    warm_up: Annotated[int, Field(ge=0)] = 5
    """Epochs in which only the fresh projection head learns, for teacher and student each."""
    beta: tuple[Annotated[float, Field(ge=0)], ...] = (4.0,)
    """Weight of the attention of each stage, shallow to deep; one value counts for all stages."""
    reduction: Literal["sum", "mean"] = "sum"
    """Whether squared differences are summed over the places of a map, or averaged as in the code."""
    power: Annotated[int, Field(ge=1)] = 2
    """p of the attention maps."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch with at least this utility counts, for teacher and student each."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises SettingError if the number of betas fits neither 1 nor the stages."""
        require_taps(encoder, "NAD")
        beta = self._weights(len(encoder.spec.taps))
        repair = begin(
            encoder, images, batch_size=self.batch_size, floor=self.utility_floor, purpose="NAD", run=run
        )
        first = self._how(self.teacher_epochs)
        taught = fine_tune(
            repair.suspect, repair, first, run=run.child("teacher"), task="fine-tuning the teacher"
        )
        teacher = taught.encoder.frozen()

        def attention(step: Step) -> dict[str, Tensor]:
            with torch.no_grad():
                aims = teacher.stages(step.views)
            distances = [
                weight * attention_loss(own, aim, reduction=self.reduction, p=self.power)
                for weight, own, aim in zip(beta, step.stages, aims, strict=True)
            ]
            return {"attention": torch.stack(distances).sum()}

        done = fine_tune(
            repair.suspect, repair, self._how(self.epochs, attention), run=run, task="distilling"
        )
        evidence = done.evidence(repair.gate) | {"beta": beta, "teacher": taught.evidence(repair.gate)}
        return Purified(encoder=done.encoder, history=done.history, evidence=evidence)

    def _weights(self, stages: int) -> list[float]:
        if len(self.beta) not in (1, stages):
            raise SettingError(
                f"Setting 'beta' of defense 'nad' has {len(self.beta)} values, but the encoder has {stages} "
                f"stages; give one value, or {stages}."
            )
        return list(self.beta) if len(self.beta) == stages else list(self.beta) * stages

    def _how(self, epochs: int, attention: Loss | None = None) -> FineTuning:
        plan = Plan(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        return FineTuning(
            plan=plan,
            temperature=self.temperature,
            warm_up=self.warm_up,
            extra=attention,
            gentler=self.gentler,
        )
