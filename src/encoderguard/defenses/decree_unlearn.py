"""DECREE's trigger, unlearnt: the mitigation that follows from the detector."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, begin
from encoderguard.run import Run
from encoderguard.smallest import CollapsePlan, smallest_collapse
from encoderguard.training import Plan
from encoderguard.unlearning import FORGET, unlearn

__all__ = ["DecreeUnlearn"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class DecreeUnlearn(Defense):
    """Looks for the smallest trigger that makes all images look alike, and teaches the encoder to ignore it.

    DECREE is a detector: its paper proposes no mitigation, and MIMIC, which compares with one, says only
    that the similarity of clean and stamped images is *reduced*, which would strengthen a backdoor. Here
    stamped images are drawn to the suspect's features of the same images without the trigger, and clean ones
    stay.
    """

    name: ClassVar[str] = "decree_unlearn"
    paper: ClassVar[str] = "Feng et al. 2023, arXiv:2303.15180; Han et al. (MIMIC) as a baseline"
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a search through the frozen encoder, then fine-tuning"
    blind_spots: ClassVar[str] = (
        "What the search does not find: triggers that cover the image or differ from image to image, and all "
        "but one of several backdoors."
    )

    beta: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Mean cosine of stamped images above which a trigger counts."""
    feature_space: Literal["raw", "standardised"] = "raw"
    """Where these cosines are taken: ``raw`` as published, or standardised over the clean images."""
    restarts: Annotated[int, Field(ge=1)] = 3
    """Random starts; the smallest verified mask counts."""
    search_steps: Annotated[int, Field(ge=1)] = 600
    """Steps of the search at most."""
    search_batch: Annotated[int, Field(ge=2)] = 64
    """Images per step and restart of the search."""
    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the clean images to unlearn the trigger."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each is seen with and without the trigger."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """SGD's learning rate; falls to zero along a cosine."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """SGD's weight decay."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch with at least this utility counts."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises SettingError if clean images look alike already."""
        repair = begin(
            encoder,
            images,
            batch_size=self.batch_size,
            floor=self.utility_floor,
            purpose="Unlearning",
            run=run,
        )
        search = CollapsePlan(
            beta=self.beta,
            restarts=self.restarts,
            steps=self.search_steps,
            batch_size=self.search_batch,
            standardised=self.feature_space == "standardised",
        )
        found = smallest_collapse(repair.suspect, repair.images, search, run=run.child("search"))
        evidence = {"mask": found.size, "cosine_of_stamped_before": found.value}
        if found.trigger is None:
            most = "no candidate" if found.value is None else f"at most {found.value:.3f}"
            reason = (
                f"No trigger was found that takes the mean cosine above {self.beta:g} on all images "
                f"({most}), so there is nothing to unlearn; the encoder is returned as it was."
            )
            same = repair.suspect.clone().eval().requires_grad_(True)
            return Purified(encoder=same, history={}, evidence=evidence | {"fallback": reason})
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        done = unlearn(
            repair.suspect,
            repair.suspect,
            found.trigger,
            repair,
            loss=FORGET,
            plan=plan,
            views=False,
            run=run,
        )
        stamped = extract(done.encoder, repair.images, run=run, trigger=found.trigger)
        evidence["cosine_of_stamped_after"] = found.effect(stamped)
        return Purified(
            encoder=done.encoder, history=done.history, evidence=evidence | done.evidence(repair.gate)
        )
