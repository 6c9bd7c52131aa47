"""SimCLR (Chen et al. 2020), in the setting of BadEncoder and MIMIC."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from lightly.models.modules import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import nt_xent
from encoderguard.methods import Pretrained, Pretraining
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["SimCLR"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class SimCLR(Pretraining):
    """Two views of an image attract, views of different images repel (NT-Xent).

    Departs from BadEncoder's script in the projection head's last layer (lightly's has no bias and ends in a
    BatchNorm) and in shuffling from one seed. The head is thrown away.
    """

    name: ClassVar[str] = "simclr"
    paper: ClassVar[str] = "Chen et al. 2020, arXiv:2002.05709"

    epochs: Annotated[int, Field(ge=1)] = 1000
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    """Adam's weight decay."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """Learning rate over time."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    projection_dim: Annotated[int, Field(ge=1)] = 128
    """Outputs of the projection head; its hidden layer is as wide as the features."""

    def train(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Pretrained:
        """See Pretraining."""
        student = encoder.clone().to(run.device).requires_grad_(True)
        dim = student.feature_dim
        with isolated(run.rng.integer("head")):
            head = SimCLRProjectionHead(dim, dim, self.projection_dim).to(run.device)
        model = nn.ModuleDict({"encoder": student, "head": head})

        def loss(batch: Batch) -> dict[str, Tensor]:
            views = torch.cat(batch.views(SIMCLR))
            first, second = head(student(views)).chunk(2)
            return {"nt_xent": nt_xent(first, second, self.temperature)}

        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )
        history = train(model, loss, images, plan=plan, run=run, task="pre-training")
        return Pretrained(encoder=student.eval(), history=history)
