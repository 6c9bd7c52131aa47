"""BYOL (Grill et al. 2020)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import AUGMENTATIONS, AugmentationName
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Monitor, Pretrained, Pretraining
from encoderguard.plans import Plan, Schedule
from encoderguard.pretrain._fitting import fit, follower, fresh_copy
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch

__all__ = ["BYOL", "byol_loss"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class BYOL(Pretraining):
    """One view's features predict the other's as a slowly moving copy of the encoder sees it; no negatives.

    Optimiser, heads and momentum are those of SSL-Backdoor. Departs from it in the schedule (a warm-up of 2
    epochs, about its 500 steps, then a cosine; theirs drops twice near the end) and in crop and jitter, which
    are MoCo v2's; from CTRL's code in the target, which starts as a copy of the online network; from the
    paper in the optimiser (LARS), the widths of the heads and the stronger views. Target and heads are thrown
    away.
    """

    name: ClassVar[str] = "byol"
    paper: ClassVar[str] = "Grill et al. 2020, arXiv:2006.07733"
    year: ClassVar[int] = 2020
    needs: ClassVar[str] = "unlabelled images, at least one batch"
    cost: ClassVar[str] = "training: two views forward and backward and two views forward per image and epoch"
    spreads: ClassVar[bool] = True
    blind_spots: ClassVar[str] = "features can collapse with very small batches or without the predictor"

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """The (peak) learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    """Weight decay."""
    schedule: Schedule = "warmup_cosine"
    """Learning rate over time."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 2
    """Epochs of linear warm-up of the schedule warmup_cosine."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the target that stays at the first step; it rises to 1 along a cosine."""
    augmentation: AugmentationName = "byol"
    """Whose views: badencoder (crop from .08) and ctrl (from .2) have no blur, moco_v2 and byol blur half."""
    hidden_dim: Annotated[int, Field(ge=1)] = 1024
    """Hidden units of both heads."""
    projection_dim: Annotated[int, Field(ge=1)] = 128
    """Outputs of both heads."""

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining."""
        model = self.parts(encoder, run)
        online = nn.Sequential(model["encoder"], model["head"])
        target = nn.Sequential(model["target_encoder"], model["target_head"])
        predictor, augmentation = model["predictor"], AUGMENTATIONS[self.augmentation]

        def loss(batch: Batch) -> dict[str, Tensor]:
            first, second = batch.views(augmentation)
            with torch.no_grad():
                aims = target(first), target(second)
            guesses = predictor(online(first)), predictor(online(second))
            return {"byol": byol_loss(guesses, aims)}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
        )

        def follow(step: int, total: int) -> None:
            update_momentum(online, target, cosine_schedule(step - 1, total, self.momentum, 1.0))

        history = fit(model, loss, images, plan=plan, run=run, monitor=monitor, after_step=follow)
        student = model["encoder"]
        assert isinstance(student, Encoder)
        return Pretrained(encoder=student.eval(), history=history)

    def parts(self, encoder: Encoder, run: Run) -> nn.ModuleDict:
        """Everything that changes: both encoders, both projection heads, the predictor."""
        student = fresh_copy(encoder, run)
        with isolated(run.rng.integer("head")):
            head = BYOLProjectionHead(student.feature_dim, self.hidden_dim, self.projection_dim)
            predictor = BYOLPredictionHead(self.projection_dim, self.hidden_dim, self.projection_dim)
        head, predictor = head.to(run.device), predictor.to(run.device)
        return nn.ModuleDict(
            {
                "encoder": student,
                "head": head,
                "predictor": predictor,
                "target_encoder": follower(student),
                "target_head": follower(head),
            }
        )


def byol_loss(guesses: tuple[Tensor, Tensor], aims: tuple[Tensor, Tensor]) -> Tensor:
    """``4 - 2 cos(guess_1, aim_2) - 2 cos(guess_2, aim_1)``, averaged over the batch (Eq. 2, both ways).

    Args:
        guesses: predictions ``[N, D]`` from the first and the second views.
        aims: the target's projections ``[N, D]`` of the first and the second views, without gradient.
    """
    criterion = NegativeCosineSimilarity()
    there = criterion(guesses[0].float(), aims[1].float())
    back = criterion(guesses[1].float(), aims[0].float())
    loss: Tensor = 4 + 2 * (there + back)
    return loss
