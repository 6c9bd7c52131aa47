"""Windows of images that decide where an image belongs: finding, pasting and counting what they move."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.clusters import nearest_centroids

__all__ = ["Features", "net_flips", "paste", "telling_window", "window_starts"]

Features = Callable[[Tensor], Tensor]
"""Maps images ``[N, 3, H, W]`` in [0, 1] to the features ``[N, D]`` that centroids are of."""
_BATCH = 256


def window_starts(side: int, window: int) -> list[int]:
    """Where windows begin along one side: every half window, and at the end."""
    step = max(1, window // 2)
    return sorted({*range(0, side - window + 1, step), side - window})


@torch.no_grad()
def telling_window(features: Features, image: Tensor, centroid: Tensor, window: int) -> Tensor:
    """The part of an image that ties it most to its cluster: greyed out, the cosine to the centroid is least.

    Args:
        features: see Features.
        image: ``[3, H, W]`` in [0, 1].
        centroid: ``[D]``.
        window: side of the square in pixels, at most H and W.

    Returns:
        ``[3, window, window]``; the first of equals.
    """
    places = [
        (top, left)
        for top in window_starts(image.shape[1], window)
        for left in window_starts(image.shape[2], window)
    ]
    hidden = image.expand(len(places), *image.shape).clone()
    for picture, (top, left) in zip(hidden, places, strict=True):
        picture[:, top : top + window, left : left + window] = image.mean((1, 2), keepdim=True)
    cosines = F.cosine_similarity(_all(features, hidden), centroid[None], dim=1)
    top, left = places[int(cosines.argmin())]
    return image[:, top : top + window, left : left + window]


def paste(images: Tensor, patch: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, 3, H, W]`` with ``patch [3, h, w]`` at a random place of each; the argument is unchanged."""
    (height, width), (h, w) = images.shape[-2:], patch.shape[-2:]
    drawn = torch.rand(len(images), 2, generator=generator)
    rooms = torch.tensor([height - h + 1, width - w + 1])
    pasted = images.clone()
    for picture, (top, left) in zip(pasted, (drawn * rooms).long().tolist(), strict=True):
        picture[:, top : top + h, left : left + w] = patch
    return pasted


@torch.no_grad()
def net_flips(features: Features, pasted: Tensor, before: Tensor, centroids: Tensor, cluster: int) -> int:
    """How many more images belong to ``cluster`` with the patch than without it.

    Args:
        features: see Features.
        pasted: images with the patch, ``[N, 3, H, W]``.
        before: int64 ``[N]``: their clusters without it.
        centroids: ``[K, D]``.
        cluster: the one that the patch comes from.
    """
    after = nearest_centroids(_all(features, pasted), centroids)
    return int((after == cluster).sum()) - int((before == cluster).sum())


def _all(features: Features, images: Tensor) -> Tensor:
    return torch.cat([features(part) for part in torch.split(images, _BATCH)])
