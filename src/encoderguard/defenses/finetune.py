"""FT: fine-tuning the suspect on clean images, the first thing that anybody tries."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from pydantic import Field

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, begin
from encoderguard.run import Run
from encoderguard.training import Plan
from encoderguard.tuning import FineTuning, fine_tune

__all__ = ["FineTune"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class FineTune(Defense):
    """All layers learn SimCLR's loss on clean images; the backdoor, which they never use, may fade.

    Departs from fine-tuning as it is evaluated for classifiers (Liu et al. 2018) in the loss, which needs no
    labels: NT-Xent of two views behind a fresh head that is fitted first. The last epoch with enough
    utility on held-out images counts, where BackdoorBench looks at labelled accuracy. The anchor is ours.
    """

    name: ClassVar[str] = "finetune"
    paper: ClassVar[str] = "Liu et al. 2018, arXiv:1805.12185"
    year: ClassVar[int] = 2018
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "fine-tuning"
    blind_spots: ClassVar[str] = (
        "A backdoor that contrastive training does not disturb stays, and the encoder does not show it."
    )

    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the clean images at most."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """SGD's learning rate; falls to zero along a cosine."""
    gentler: Annotated[int, Field(ge=0, le=9)] = 2
    """How often to begin anew at a third of ``lr`` where the last epoch falls below the floor."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """SGD's weight decay."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    warm_up: Annotated[int, Field(ge=0)] = 5
    """Epochs before that in which only the fresh projection head learns."""
    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cosine distance to the suspect's own features of the same clean views."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch with at least this utility counts; 0 takes the last one in any case."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense."""
        repair = begin(
            encoder,
            images,
            batch_size=self.batch_size,
            floor=self.utility_floor,
            purpose="Fine-tuning",
            run=run,
        )
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        how = FineTuning(
            plan=plan,
            temperature=self.temperature,
            warm_up=self.warm_up,
            anchor=self.anchor,
            gentler=self.gentler,
        )
        done = fine_tune(repair.suspect, repair, how, run=run)
        return Purified(encoder=done.encoder, history=done.history, evidence=done.evidence(repair.gate))
