"""MoCo v2 (Chen, Fan, Girshick and He 2020)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import update_momentum
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

__all__ = ["MoCo", "queue_length", "queued_nt_xent"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class MoCo(Pretraining):
    """A view must be told from a long queue of earlier keys, made by a slowly moving copy of the encoder.

    Settings are those of SSL-Backdoor and CorruptEncoder. Departs from the authors' code in running on one
    device: BatchNorm statistics are those of the whole batch, so there is nothing to shuffle; and in the
    queue, which starts from random directions as theirs does but holds at most half the training set, so that
    a picture seldom meets its own earlier key. The key encoder and both heads are thrown away.
    """

    name: ClassVar[str] = "moco"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv:2003.04297"
    year: ClassVar[int] = 2020
    needs: ClassVar[str] = "unlabelled images, at least one batch"
    cost: ClassVar[str] = "training: one view forward and backward and one view forward per image and epoch"
    blind_spots: ClassVar[str] = "no BatchNorm over parts of a batch, which the authors' several devices have"

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step; each gives a query and a key."""
    lr: Annotated[float, Field(gt=0)] = 0.06
    """The (peak) learning rate of SGD with momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay."""
    schedule: Schedule = "cosine"
    """Learning rate over time."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs of linear warm-up of the schedule warmup_cosine."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """tau of the loss."""
    queue: Annotated[int, Field(ge=1)] = 65536
    """Keys to tell a view from; cut to half the training set and to whole batches."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """Share of the key encoder that stays at each step."""
    augmentation: AugmentationName = "moco_v2"
    """Whose views: badencoder (crop from .08) and ctrl (from .2) have no blur, moco_v2 and byol blur half."""
    hidden_dim: Annotated[int, Field(ge=0)] = 0
    """Hidden units of the projection head; 0: as wide as the features."""
    projection_dim: Annotated[int, Field(ge=1)] = 128
    """Outputs of the projection head."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Optimiser; sgd has momentum 0.9."""

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining."""
        model = self.parts(encoder, images, run)
        query = nn.Sequential(model["encoder"], model["head"])
        key = nn.Sequential(model["key_encoder"], model["key_head"])
        contrast, augmentation = model["contrast"], AUGMENTATIONS[self.augmentation]

        def loss(batch: Batch) -> dict[str, Tensor]:
            first, second = batch.views(augmentation)
            with torch.no_grad():
                keys = key(second)
            return {"info_nce": contrast(query(first).float(), keys.float())}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
        )
        history = fit(
            model,
            loss,
            images,
            plan=plan,
            run=run,
            monitor=monitor,
            after_step=lambda step, total: update_momentum(query, key, self.momentum),
        )
        student = model["encoder"]
        assert isinstance(student, Encoder)
        return Pretrained(encoder=student.eval(), history=history)

    def parts(self, encoder: Encoder, images: ImageSet, run: Run) -> nn.ModuleDict:
        """Everything that changes: both encoders, both heads, and the loss with its queue."""
        student = fresh_copy(encoder, run)
        dim = student.feature_dim
        length = queue_length(self.queue, len(images), self.batch_size)
        with isolated(run.rng.integer("head")):
            head = MoCoProjectionHead(dim, self.hidden_dim or dim, self.projection_dim).to(run.device)
            contrast = queued_nt_xent(length, self.projection_dim, self.temperature).to(run.device)
        return nn.ModuleDict(
            {
                "encoder": student,
                "head": head,
                "key_encoder": follower(student),
                "key_head": follower(head),
                "contrast": contrast,
            }
        )


def queue_length(wanted: int, images: int, batch_size: int) -> int:
    """``wanted`` or half the images, whichever is less, in whole batches and at least one."""
    return max(1, min(wanted, images // 2) // batch_size) * batch_size


def queued_nt_xent(length: int, dim: int, temperature: float) -> NTXentLoss:
    """Lightly's loss with a queue of ``length`` unit vectors ``[dim]`` that a checkpoint keeps.

    lightly leaves the queue out of the state, and a resumed run would start with another one.
    """
    contrast = NTXentLoss(temperature=temperature, memory_bank_size=(length, dim))
    bank = contrast.memory_bank
    bank.register_buffer("bank", bank.bank)
    bank.register_buffer("bank_ptr", bank.bank_ptr)
    return contrast
