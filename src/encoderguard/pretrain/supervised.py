"""Supervised training: a classifier whose body becomes the encoder."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.augment import LIGHT
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError
from encoderguard.images import ImageSet
from encoderguard.methods import Monitor, Pretrained, Pretraining
from encoderguard.plans import Plan, Schedule
from encoderguard.pretrain._fitting import fit, fresh_copy, kept
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch

__all__ = ["Supervised"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class Supervised(Pretraining):
    """Encoder and one linear layer learn the labels (cross-entropy); the layer is kept beside the encoder.

    The usual recipe for small images (He et al. 2016): shifts and flips, SGD with momentum. Departs from it
    in the schedule, a cosine in place of steps. MIMIC's comparison with defenses for classifiers (its Table
    II) needs such an encoder with its layer.
    """

    name: ClassVar[str] = "supervised"
    paper: ClassVar[str] = "He et al. 2016, arXiv:1512.03385"
    year: ClassVar[int] = 2016
    needs: ClassVar[str] = "labelled images, at least one batch"
    cost: ClassVar[str] = "training: one view per image and epoch, forward and backward"
    spreads: ClassVar[bool] = True
    blind_spots: ClassVar[str] = "features fit the labels trained on and may not transfer to other tasks"
    needs_labels: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The (peak) learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Optimiser; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay."""
    schedule: Schedule = "cosine"
    """Learning rate over time."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs of linear warm-up of the schedule warmup_cosine."""

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining. ``head`` holds ``weight [C, D]`` and ``bias [C]`` of the linear layer.

        Raises:
            ImageError: there are no labels, only one class, or canvases, which have no labels.
        """
        labels, classes = _labels(images)
        student = fresh_copy(encoder, run)
        with isolated(run.rng.integer("head")):
            head = nn.Linear(student.feature_dim, classes).to(run.device)
        model = nn.ModuleDict({"encoder": student, "head": head})

        def loss(batch: Batch) -> dict[str, Tensor]:
            (views,) = batch.views(LIGHT, 1)
            aims = labels[batch.indices].to(run.device)
            return {"cross_entropy": F.cross_entropy(head(student(views)).float(), aims)}

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
        return Pretrained(encoder=student.eval(), history=history, head=kept(head))


def _labels(images: ImageSet) -> tuple[Tensor, int]:
    """The labels and how many classes there are."""
    if images.labels is None:
        raise ImageError(
            f"Supervised training learns from labels, {images.name} has none; give labelled images."
        )
    if images.canvases is not None:
        raise ImageError(
            f"{images.name} has {len(images.canvases)} appended canvases without labels, which supervised "
            "training cannot use; give a set without them."
        )
    classes = max(int(images.labels.max()) + 1, len(images.classes))
    if classes < 2:
        raise ImageError(f"Supervised training needs at least 2 classes, {images.name} has {classes}.")
    return images.labels, classes
