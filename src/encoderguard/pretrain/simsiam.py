"""SimSiam (Chen and He 2021)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, final

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import AUGMENTATIONS, AugmentationName
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Monitor, Pretrained, Pretraining
from encoderguard.plans import Plan, Schedule
from encoderguard.pretrain._fitting import fit, fresh_copy
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch

__all__ = ["SimSiam", "simsiam_loss"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class SimSiam(Pretraining):
    """One view's features predict the other's, whose gradient is stopped; no negatives, no momentum encoder.

    Follows the paper: cosine schedule for all but the predictor, whose learning rate is fixed; BatchNorm on
    every layer of the projection head. Departs from it in blurring on the device with a standard deviation in
    pixels, and from the port in SSL-Backdoor's successor, whose crops keep at least .8 of the area: use
    ``crop_min=0.8`` for that. The heads are thrown away.
    """

    name: ClassVar[str] = "simsiam"
    paper: ClassVar[str] = "Chen and He 2021, arXiv:2011.10566"
    year: ClassVar[int] = 2021
    needs: ClassVar[str] = "unlabelled images, at least one batch"
    cost: ClassVar[str] = "training: two views per image and epoch, forward and backward"
    spreads: ClassVar[bool] = True
    blind_spots: ClassVar[str] = "features can collapse with other optimisers or without the predictor"

    epochs: Annotated[int, Field(ge=1)] = 300
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The (peak) learning rate, and the predictor's throughout."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Optimiser; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay."""
    schedule: Schedule = "cosine"
    """Learning rate over time of all but the predictor."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs of linear warm-up of the schedule warmup_cosine."""
    augmentation: AugmentationName = "moco_v2"
    """Whose views: badencoder and ctrl have no blur, moco_v2 and byol blur half of them."""
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest share of the image's area that a view shows."""
    hidden_dim: Annotated[int, Field(ge=1)] = 2048
    """Hidden units and outputs of the projection head."""
    predictor_dim: Annotated[int, Field(ge=1)] = 512
    """Hidden units of the predictor."""

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining."""
        student, wide = fresh_copy(encoder, run), self.hidden_dim
        with isolated(run.rng.integer("head")):
            head = SimSiamProjectionHead(student.feature_dim, wide, wide).to(run.device)
            predictor = SimSiamPredictionHead(wide, self.predictor_dim, wide).to(run.device)
        model = nn.ModuleDict({"encoder": student, "head": head, "predictor": predictor})
        augmentation = replace(AUGMENTATIONS[self.augmentation], crop_scale=(self.crop_min, 1.0))

        def loss(batch: Batch) -> dict[str, Tensor]:
            first, second = (head(student(view)) for view in batch.views(augmentation))
            return {"simsiam": simsiam_loss((predictor(first), predictor(second)), (first, second))}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
        )
        fixed = list(predictor.parameters())
        history = fit(model, loss, images, plan=plan, run=run, monitor=monitor, fixed=fixed)
        return Pretrained(encoder=student.eval(), history=history)


def simsiam_loss(guesses: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor]) -> Tensor:
    """``-cos(p_1, stop(z_2)) / 2 - cos(p_2, stop(z_1)) / 2``, averaged over the batch (Eq. 4).

    Args:
        guesses: predictions ``[N, D]`` p from the first and the second views.
        projections: ``[N, D]`` z of the first and the second views; no gradient flows into them from here.
    """
    criterion = NegativeCosineSimilarity()
    first, second = (z.detach().float() for z in projections)
    loss: Tensor = 0.5 * (criterion(guesses[0].float(), second) + criterion(guesses[1].float(), first))
    return loss
