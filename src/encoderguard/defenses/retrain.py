"""Retraining: a fresh encoder from the clean images alone, the floor that a repair must beat."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from pydantic import Field
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.registry import register
from encoderguard.repair import Contrast, begin
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["Retrain"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class Retrain(Defense):
    """SimCLR from random weights on the clean images; the suspect gives its architecture and nothing else.

    No backdoor can survive, and what the suspect learned is lost with it: a defense with less accuracy than
    this has cost more than it saved. A fifth of the images is held out to compare with the suspect, as in
    the other baselines, so that all train on the same images.
    """

    name: ClassVar[str] = "retrain"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv:2002.05709"
    year: ClassVar[int] = 2020
    needs: ClassVar[str] = "clean unlabelled images, the more the better"
    cost: ClassVar[str] = "a training"
    blind_spots: ClassVar[str] = "Poison among the clean images is learned like everything else."

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the clean images."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's (peak) learning rate: it rises over the first tenth, then falls along a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    """Adam's weight decay."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises EncoderError if a wrapped module cannot be re-initialised."""
        repair = begin(encoder, images, batch_size=self.batch_size, floor=0.0, purpose="Retraining", run=run)
        student = repair.suspect.fresh(run.rng.child("student")).to(run.device).requires_grad_(True)
        contrast = Contrast(student, run, temperature=self.temperature)

        def loss(batch: Batch) -> dict[str, Tensor]:
            return {"nt_xent": contrast(student, batch)}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="one_cycle",
        )
        model = nn.ModuleDict({"student": student, "contrast": contrast})
        history = train(model, loss, repair.images, plan=plan, run=run, task="retraining")
        evidence = {
            "utility_after": repair.gate.measure(student),
            "held_out": repair.gate.count,
            "epochs_used": self.epochs,
        }
        return Purified(encoder=student.eval(), history=history, evidence=evidence)
