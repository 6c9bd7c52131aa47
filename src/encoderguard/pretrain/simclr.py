"""SimCLR (Chen et al. 2020), in the setting of BadEncoder and MIMIC, or in CTRL's."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from lightly.models.modules import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import AUGMENTATIONS, AugmentationName
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import nt_xent
from encoderguard.methods import Monitor, Pretrained, Pretraining
from encoderguard.plans import Plan, Schedule
from encoderguard.pretrain._fitting import fit, fresh_copy
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch

__all__ = ["SimCLR"]

Mode = Literal["default", "ctrl"]
_BY_MODE: Any = None  # filled from the mode before the settings are checked
_PRESETS: dict[Mode, dict[str, Any]] = {
    "default": {
        "epochs": 1000,
        "batch_size": 256,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "schedule": "constant",
        "warmup_epochs": 0,
        "augmentation": "badencoder",
        "head": "batch_norm",
        "hidden_dim": 0,
    },
    "ctrl": {
        "epochs": 800,
        "batch_size": 512,
        "optimizer": "sgd",
        # their loss is NT-Xent times .5 / .07, with .06 and 5e-4: for SGD the same as these two with NT-Xent
        "lr": 0.06 * 0.5 / 0.07,
        "weight_decay": 5e-4 * 0.07 / 0.5,
        "schedule": "warmup_cosine",
        "warmup_epochs": 10,
        "augmentation": "ctrl",
        "head": "plain",
        "hidden_dim": 512,
    },
}


@register
@final
@dataclass(frozen=True, kw_only=True)
class SimCLR(Pretraining):
    """Two views of an image attract, views of different images repel (NT-Xent).

    ``mode`` chooses whose recipe fills the settings that are not given: BadEncoder's and MIMIC's, or CTRL's,
    whose backdoor needs views without blur. Departs from BadEncoder's script in the projection head's last
    layer (lightly's has no bias and ends in a BatchNorm) and in shuffling from one seed; from CTRL's code in
    the factor tau / 0.07 of its loss, which is part of the learning rate and the weight decay here (the steps
    are the same), and in drawing colour changes per image, not per batch. The head is thrown away.
    """

    name: ClassVar[str] = "simclr"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv:2002.05709"
    year: ClassVar[int] = 2020
    needs: ClassVar[str] = "unlabelled images, at least one batch"
    cost: ClassVar[str] = "training: two views per image and epoch, forward and backward"
    spreads: ClassVar[bool] = True
    blind_spots: ClassVar[str] = "small batches give few negatives; no training over several machines"

    mode: Mode = "default"
    """Whose recipe fills the settings that are not given."""
    epochs: Annotated[int, Field(ge=1)] = _BY_MODE
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = _BY_MODE
    """Images per step; each gives two views."""
    optimizer: Literal["adam", "adamw", "sgd"] = _BY_MODE
    """Optimiser; sgd has momentum 0.9."""
    lr: Annotated[float, Field(gt=0)] = _BY_MODE
    """The (peak) learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight decay."""
    schedule: Schedule = _BY_MODE
    """Learning rate over time."""
    warmup_epochs: Annotated[int, Field(ge=0)] = _BY_MODE
    """Epochs of linear warm-up of the schedule warmup_cosine."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    augmentation: AugmentationName = _BY_MODE
    """Whose views: badencoder (crop from .08) and ctrl (from .2) have no blur, moco_v2 and byol blur half."""
    head: Literal["batch_norm", "plain"] = _BY_MODE
    """Projection head with BatchNorm after both layers, or with biases and without BatchNorm."""
    hidden_dim: Annotated[int, Field(ge=0)] = _BY_MODE
    """Hidden units of the projection head; 0: as wide as the features."""
    projection_dim: Annotated[int, Field(ge=1)] = 128
    """Outputs of the projection head."""

    def __post_init__(self) -> None:
        """Fill the settings that were not given from the mode, then check all."""
        for key, value in _PRESETS.get(self.mode, {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining."""
        student = fresh_copy(encoder, run)
        dim = student.feature_dim
        with isolated(run.rng.integer("head")):
            head = SimCLRProjectionHead(
                dim, self.hidden_dim or dim, self.projection_dim, batch_norm=self.head == "batch_norm"
            ).to(run.device)
        model = nn.ModuleDict({"encoder": student, "head": head})
        augmentation = AUGMENTATIONS[self.augmentation]

        def loss(batch: Batch) -> dict[str, Tensor]:
            views = torch.cat(batch.views(augmentation))
            first, second = head(student(views)).chunk(2)
            return {"nt_xent": nt_xent(first, second, self.temperature)}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
        )
        history = fit(model, loss, images, plan=plan, run=run, monitor=monitor)
        return Pretrained(encoder=student.eval(), history=history)
