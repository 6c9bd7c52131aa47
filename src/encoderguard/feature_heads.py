"""Heads on features: a linear one from a file, or, without classes, the nearest centroid of clusters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from encoderguard.clusters import require_spread
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import require_images
from encoderguard.repair import PseudoClasses, pseudo_classes
from encoderguard.run import Run
from encoderguard.similarity import standardise

__all__ = ["Head", "centroid_head", "cluster_head", "linear_head"]

Head = Callable[[Tensor], Tensor]
"""Maps features ``[..., D]`` to scores ``[..., K]``; the largest is the answer."""
_TEMPERATURE = 0.1
"""Divides cosines to centroids, so that a softmax of them is sharp enough; ours."""


def centroid_head(clean: Tensor, classes: PseudoClasses) -> Head:
    """The nearest centroid as a head: cosines over 0.1, of features standardised over ``clean`` ``[N, D]``.

    ``classes`` are clusters of these images; the centroids are taken anew, of rows of length 1.
    """
    z = F.normalize(standardise(clean, clean), dim=1)
    labels = classes.labels.to(z.device)
    unit = F.normalize(torch.stack([z[labels == k].mean(0) for k in range(len(classes.centroids))]), dim=1)

    def scores(features: Tensor) -> Tensor:
        there = features.to(unit.device)
        return F.normalize(standardise(there, clean), dim=-1) @ unit.T / _TEMPERATURE

    return scores


def cluster_head(encoder: Encoder, images: ImageSet, count: int, *, run: Run) -> tuple[Head, PseudoClasses]:
    """``count`` clusters of the standardised features of clean images, and ``centroid_head`` on them.

    Raises:
        ImageError: fewer images than clusters.
        EncoderError: the features do not depend on the image.
        NonFiniteError: a feature is NaN or infinite.
    """
    require_images(images, count, f"Taking {count} clusters in the place of classes")
    clean = extract(encoder, images, run=replace(run, precision="float32"))
    require_spread(clean, images.name)
    classes = pseudo_classes(standardise(clean, clean), count, run.rng.child("clusters"))
    return centroid_head(clean.to(run.device), classes), classes


def linear_head(path: str | Path, dim: int, device: torch.device) -> tuple[Head, int]:
    """A linear head from a ``head.safetensors`` (``weight [K, D]``, ``bias [K]``), and K.

    Raises:
        SettingError: there is no such file, or it holds no linear head on ``dim`` features.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SettingError(
            f"The classifier {path} cannot be read ({type(error).__name__}); give a head.safetensors."
        ) from None
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.shape != (len(bias), dim):
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise SettingError(
            f"The classifier {path} must hold weight [K, {dim}] and bias [K] for this encoder, found {found}."
        )
    weight, bias = weight.float().to(device), bias.float().to(device)
    return lambda features: F.linear(features.to(weight.device), weight, bias), len(bias)
