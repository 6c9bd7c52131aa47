"""Clusters of features in the place of classes: how many, who belongs to which, which of them stands out."""

from typing import Annotated

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from encoderguard.errors import EncoderError, ImageError
from encoderguard.random import Rng

__all__ = [
    "Clusters",
    "elbow",
    "elbow_of_features",
    "nearest_centroids",
    "neighbour_votes",
    "outlier_indices",
    "require_spread",
]

Clusters = Annotated[int, Field(ge=2)]
"""A number of clusters as a setting."""
_CONSTANT = 1e-5
"""Spread of features relative to their length."""
_CHUNK = 4096
_NORMAL_MAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


def require_spread(features: Tensor, name: str) -> None:
    """Raise EncoderError if the features ``[N, D]`` of the images of ``name`` are all the same."""
    spread = (features - features.mean(0)).norm(dim=1).mean()
    if not spread > _CONSTANT * features.norm(dim=1).mean():
        raise EncoderError(
            f"The encoder gives the same features for all {len(features)} images of {name}, so they have no "
            "clusters; check its weights and preprocessing."
        )


def elbow(costs: Tensor) -> int:
    """The place of the elbow of a falling curve ``[M]``: farthest below the line from first to last point.

    Kneedle (Satopaa et al. 2011) without its smoothing: both axes are scaled to [0, 1], which changes no
    order; the first of equals is taken, and 0 of a curve that does not fall.
    """
    fall = costs[0] - costs[-1]
    if len(costs) < 3 or not fall > 0:
        return 0
    height = (costs.double() - costs[-1]) / fall
    line = torch.linspace(1, 0, len(costs), dtype=torch.float64, device=costs.device)
    return int((line - height).argmax())


def elbow_of_features(features: Tensor, fewest: int, most: int, rng: Rng) -> tuple[int, list[float]]:
    """The number of clusters from ``fewest`` to ``most`` at the elbow, and the k-means cost of each.

    Args:
        features: ``[N, D]``; they are L2-normalised first.
        fewest: at least 1.
        most: at most a quarter of the images are tried, but ``fewest`` always.
        rng: of the k-means starts.

    Raises:
        ImageError: fewer images than ``fewest``.
    """
    if len(features) < fewest:
        raise ImageError(
            f"{fewest} clusters need at least {fewest} images, found {len(features)}; "
            "give more images or ask for fewer clusters."
        )
    rows = F.normalize(features.float(), dim=1).cpu().numpy()
    costs = []
    for count in range(fewest, max(fewest, min(most, len(rows) // 4)) + 1):
        fitted = KMeans(count, n_init=4, random_state=rng.integer("elbow", count) % 2**32).fit(rows)
        costs.append(float(fitted.inertia_))
    return fewest + elbow(torch.tensor(costs, dtype=torch.float64)), costs


def nearest_centroids(features: Tensor, centroids: Tensor) -> Tensor:
    """Which centroid of ``[K, D]`` has the largest cosine with each row of ``[..., D]``: int64 ``[...]``."""
    return (F.normalize(features, dim=-1) @ F.normalize(centroids, dim=1).T).argmax(-1)


def neighbour_votes(queries: Tensor, bank: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """The label that most of the ``k`` nearest rows of a bank have; of equals the smallest.

    Args:
        queries: ``[N, D]``.
        bank: ``[M, D]``; at most M neighbours are asked.
        labels: int64 ``[M]``, from 0 on.
        k: neighbours, by cosine.

    Returns:
        int64 ``[N]``.
    """
    unit, classes = F.normalize(bank, dim=1), int(labels.max()) + 1
    found = []
    for chunk in torch.split(F.normalize(queries, dim=1), _CHUNK):
        nearest = (chunk @ unit.T).topk(min(k, len(unit)), dim=1).indices
        found.append(F.one_hot(labels[nearest], classes).sum(1).argmax(1))
    return torch.cat(found)


def outlier_indices(sizes: Tensor) -> Tensor:
    """How many robust standard deviations each of ``sizes`` ``[K]`` lies *below* the median: float64 ``[K]``.

    ``(median - size) / (1.4826 MAD)``, Neural Cleanse's anomaly index with a sign: a large mask is no sign of
    a backdoor. The MAD is the median of the absolute deviations and is not divided by anything else; an even
    number of values has the mean of the two middle ones as its median. No spread at all gives 0 to values
    at the median.
    """
    values = sizes.double()
    median = values.quantile(0.5)
    mad = (values - median).abs().quantile(0.5)
    return (median - values) / (_NORMAL_MAD * mad).clamp_min(1e-6)
