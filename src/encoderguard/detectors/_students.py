"""Clean company made from the suspect itself: quick students, and a copy with a few steps of clean tuning."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.disturbance import random_patches
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.repair import Contrast
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["distil", "tuned"]

_PATCHES = 0.3
"""Share of the student's views that a random patch covers: without patches some students keep a backdoor."""
_BATCH = 64


@dataclass(frozen=True)
class _Length:
    """A number of steps as whole passes over the images."""

    images: ImageSet
    steps: int

    @property
    def batch(self) -> int:
        return min(_BATCH, len(self.images))

    @property
    def epochs(self) -> int:
        return max(1, round(self.steps / (len(self.images) // self.batch)))


def distil(suspect: Encoder, images: ImageSet, steps: int, *, run: Run) -> Encoder:
    """An empty student that learns the suspect's features of clean images: cosine and NT-Xent, as in MIMIC.

    The backdoor sleeps on clean images, so the student hardly learns it (no proof: some do).

    Args:
        suspect: unchanged.
        images: clean images.
        steps: about so many of up to 64 images, in whole passes over the images.
        run: device, precision, streams, progress.
    """
    teacher = suspect.frozen().to(run.device)
    student = teacher.fresh(run.rng.child("student")).to(run.device).requires_grad_(True)
    contrast = Contrast(student, run)
    model = nn.ModuleDict({"student": student, "contrast": contrast})
    length = _Length(images, steps)

    def loss(batch: Batch) -> dict[str, Tensor]:
        views = torch.cat(batch.views(SIMCLR))
        with torch.no_grad():
            aim = teacher(views)
        features = student(random_patches(views, _PATCHES, batch.rng.generator("patches")))
        return {"cosine": cosine_distance(features, aim), "nt_xent": contrast.of_features(features)}

    plan = Plan(
        epochs=length.epochs,
        batch_size=length.batch,
        lr=3e-3,
        optimizer="adamw",
        weight_decay=1e-4,
        schedule="one_cycle",
    )
    train(model, loss, images, plan=plan, run=run, task="distilling a student")
    return student.eval()


def tuned(suspect: Encoder, images: ImageSet, steps: int, *, run: Run) -> Encoder:
    """A copy after a few contrastive steps on clean images: does the found trigger still work?

    Args:
        suspect: unchanged.
        images: clean images; with few steps only the first so many batches are used.
        steps: steps of up to 64 images.
        run: device, precision, streams, progress.
    """
    copy = suspect.clone().to(run.device).requires_grad_(True)
    contrast = Contrast(copy, run)
    used = images.subset(range(min(len(images), steps * _BATCH)))
    length = _Length(used, steps)
    head_plan = Plan(epochs=length.epochs, batch_size=length.batch, lr=1e-2)
    contrast.warm_up(copy, used, plan=head_plan, run=run)
    model = nn.ModuleDict({"encoder": copy, "contrast": contrast})

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"nt_xent": contrast(copy, batch)}

    plan = Plan(epochs=length.epochs, batch_size=length.batch, lr=1e-3)
    train(model, loss, used, plan=plan, run=run.child("tuning"), task="tuning a copy")
    return copy.eval()
