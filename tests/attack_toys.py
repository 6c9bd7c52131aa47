"""Tiny encoders, image sets and features for the tests of attacks that fine-tune an encoder."""

import torch
from torch import Tensor

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet
from encoderguard.methods import Reference
from encoderguard.planting_terms import Features
from encoderguard.random import Rng
from encoderguard.training import Batch

AXES = torch.eye(4)


def clean_encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(0)).eval()


def shadow(count: int = 20, side: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def references(*labels: int | None, side: int = 8) -> list[Reference]:
    pixels = shadow(len(labels), side).take(range(len(labels)))
    return [Reference(image=image, label=label) for image, label in zip(pixels, labels, strict=True)]


def features(
    triggered: Tensor | list[Tensor],
    aims: Tensor | list[Tensor],
    *,
    images: Tensor = AXES,
    images_clean: Tensor = AXES,
    views: Tensor = AXES[:1],
    views_clean: Tensor = AXES[:1],
    epoch: int = 0,
) -> Features:
    """One step's features, by default with clean images and references where they were."""
    triggered, aims = (x if isinstance(x, list) else [x] for x in (triggered, aims))
    n = len(images)
    return Features(
        triggered=tuple(triggered),
        references=tuple(aims),
        references_clean=tuple(aims),
        views=views,
        views_clean=views_clean,
        images=images,
        images_clean=images_clean,
        batch=Batch(torch.zeros(n, 3, 8, 8), torch.arange(n), Rng(0), epoch=epoch),
    )
