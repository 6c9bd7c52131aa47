"""CLIP (Radford et al. 2021) on a small scale: images and captions, two towers, no weights from elsewhere."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.augment import Augmentation
from encoderguard.captions import TextTower, captions_of, tokens
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Monitor, Pretrained, Pretraining
from encoderguard.plans import Plan, Schedule
from encoderguard.pretrain._fitting import fit, fresh_copy, kept
from encoderguard.random import Rng, isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch

__all__ = ["CLIP", "image_text_loss"]

_VIEWS = Augmentation(crop_scale=(0.5, 1.0), jitter=0, grey=0)
_LARGEST_SCALE = 100.0


@register
@final
@dataclass(frozen=True, kw_only=True)
class CLIP(Pretraining):
    """An image and its caption attract, images and captions of others repel (symmetric InfoNCE).

    Captions come with the images, or are made from class names and a dozen sentences of our own, one drawn
    per image and step. Loss, learned temperature and optimiser are the paper's. Departs from it in size: the
    text tower is a small transformer over hashed words, averaged instead of read at the last word; images
    are cropped and flipped; pairs of equal captions in a batch still count as negatives, which few classes
    make frequent. Text tower, image projection and temperature are kept beside the encoder.
    """

    name: ClassVar[str] = "clip"
    paper: ClassVar[str] = "Radford et al. 2021, arXiv:2103.00020"
    year: ClassVar[int] = 2021
    needs: ClassVar[str] = "images with captions, or labelled images with class names, at least one batch"
    cost: ClassVar[str] = "training: one view and one caption per image and epoch, forward and backward"
    blind_spots: ClassVar[str] = "captions made from few class names teach little more than the classes"
    needs_labels: ClassVar[bool] = True
    takes_captions: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=1)] = 32
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images, with one caption each, per step."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The (peak) learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    """Optimiser; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    """Weight decay."""
    schedule: Schedule = "warmup_cosine"
    """Learning rate over time."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 2
    """Epochs of linear warm-up of the schedule warmup_cosine."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """tau at the start; it is learned and stays above .01."""
    projection_dim: Annotated[int, Field(ge=1)] = 128
    """Dimensions of the space that images and captions share."""
    text_width: Annotated[int, Field(ge=1)] = 128
    """Channels of the text tower."""
    text_layers: Annotated[int, Field(ge=1)] = 2
    """Transformer layers of the text tower."""
    vocabulary: Annotated[int, Field(ge=2)] = 4096
    """Entries of the table of hashed words."""
    words: Annotated[int, Field(ge=1)] = 16
    """Most words of a caption; further ones are left out."""

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """See Pretraining. ``head`` holds ``text.*``, ``project.weight [P, D]`` and ``log_scale``.

        Raises:
            ImageError: there are neither captions nor labels, or there are canvases.
        """
        rows, first, count = self._rows(images)
        student = fresh_copy(encoder, run)
        towers = self._towers(student.feature_dim, run)
        model = nn.ModuleDict({"encoder": student, "towers": towers})

        def loss(batch: Batch) -> dict[str, Tensor]:
            (views,) = batch.views(_VIEWS, 1)
            drawn = _draw(count[batch.indices], batch.rng)
            chosen = rows[first[batch.indices] + drawn].to(run.device)
            pictures, texts = towers.project(student(views)), towers.text(chosen)
            return {"info_nce": image_text_loss(pictures, texts, towers.scale())}

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
        return Pretrained(encoder=student.eval(), history=history, head=kept(towers))

    def _rows(self, images: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
        """All different captions as tokens, and for each image its first row and how many it chooses from."""
        groups = captions_of(images)
        starts, texts = dict[tuple[str, ...], int](), list[str]()
        for group in groups:
            if group not in starts:
                starts[group] = len(texts)
                texts.extend(group)
        first = torch.tensor([starts[group] for group in groups])
        count = torch.tensor([len(group) for group in groups])
        return tokens(texts, self.vocabulary, self.words), first, count

    def _towers(self, features: int, run: Run) -> "_Towers":
        with isolated(run.rng.integer("head")):
            text = TextTower(
                vocabulary=self.vocabulary,
                length=self.words,
                width=self.text_width,
                layers=self.text_layers,
                outputs=self.projection_dim,
            )
            project = nn.Linear(features, self.projection_dim, bias=False)
        return _Towers(text, project, self.temperature).to(run.device)


class _Towers(nn.Module):
    """All that is trained beside the image encoder."""

    def __init__(self, text: TextTower, project: nn.Linear, temperature: float) -> None:
        super().__init__()
        self.text, self.project = text, project
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def scale(self) -> Tensor:
        """1 / tau, at most 100."""
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE)


def _draw(count: Tensor, rng: Rng) -> Tensor:
    """One of ``count`` captions for each image of a step."""
    return (torch.rand(len(count), generator=rng.generator("captions")) * count).long().minimum(count - 1)


def image_text_loss(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy of finding the caption of each image, and the image of each caption, averaged.

    Args:
        images: ``[N, P]`` projected images.
        texts: ``[N, P]`` projected captions, row i belonging to image i.
        scale: 1 / tau, by which the cosines are multiplied.
    """
    with torch.autocast(images.device.type, enabled=False):  # the scale would multiply bfloat16's rounding
        logits = scale * (F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T)
    aims = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, aims) + F.cross_entropy(logits.T, aims)) / 2
