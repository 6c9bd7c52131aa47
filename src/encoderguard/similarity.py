"""How alike feature vectors, or two feature spaces, are: pure tensor functions.

Rows are images, columns are feature dimensions. Nothing here knows of encoders or triggers.
"""

from typing import Literal

import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from encoderguard.errors import ImageError

__all__ = [
    "debiased_linear_cka",
    "embedding_map",
    "mean_pairwise_cosine",
    "neighbour_overlap",
    "standardise",
    "z_score",
]

_CHUNK = 1024
"""Rows of a similarity matrix that are in memory at once."""


def mean_pairwise_cosine(z: Tensor) -> Tensor:
    """The mean cosine over all pairs of different rows, without forming the pairs.

    For unit vectors ``u_i`` the sum over ``i != j`` of ``u_i . u_j`` is ``|sum u|^2 - sum |u|^2``; divided by
    ``N (N - 1)`` that is ``(N |mu|^2 - 1) / (N - 1)``. A zero row has cosine 0 with every other row.

    Args:
        z: ``[..., N, D]``; leading dimensions (restarts, say) are independent.

    Returns:
        ``[...]`` in ``[-1 / (N - 1), 1]``, differentiable.

    Raises:
        ImageError: fewer than two rows.
    """
    n = z.shape[-2]
    _require_rows(n, 2, "A mean pairwise cosine")
    unit = F.normalize(z, dim=-1)
    together = unit.sum(-2).square().sum(-1)
    alone = unit.square().sum((-2, -1))
    return (together - alone) / (n * (n - 1))


def z_score(
    clean_features: Tensor, triggered_features: Tensor, dispersion: Literal["var", "std"] = "var"
) -> float:
    """How much more alike a trigger makes features, in units of how much clean pairs differ.

    The backdoor z-score of Carlini and Terzis (2022): the mean cosine over pairs of triggered images minus
    that over pairs of clean ones, divided by the variance of the latter, as in DECREE's code. A bound of 2.5
    means something for ``var`` alone; ``std`` is what a z-score usually divides by.

    Args:
        clean_features: ``[N, D]``, of images without the trigger.
        triggered_features: ``[M, D]``, of images with it.
        dispersion: of the cosines of all pairs of different clean rows, both without Bessel's correction.

    Returns:
        Any number; 0 if the trigger changes nothing. Not finite if all clean pairs are equally alike.

    Raises:
        ImageError: fewer than three clean rows (two make one pair), or fewer than two triggered ones.
    """
    _require_rows(len(clean_features), 3, "The dispersion of a z-score")
    clean, triggered = clean_features.double(), triggered_features.double()
    unit = F.normalize(clean, dim=1)
    n, mean = len(unit), mean_pairwise_cosine(clean)
    # the sum of all squared cosines is the squared norm of U'U; each row with itself gives its own square
    squares = (unit.T @ unit).square().sum() - unit.square().sum(1).square().sum()
    variance = (squares / (n * (n - 1)) - mean.square()).clamp_min(0)
    scale = variance if dispersion == "var" else variance.sqrt()
    return float((mean_pairwise_cosine(triggered) - mean) / scale)


def standardise(z: Tensor, reference: Tensor, *, floor: float = 0.1) -> Tensor:
    """Centre and scale each dimension of ``z`` by mean and standard deviation over ``reference``.

    Features behind a ReLU are all positive, so that clean images are similar already; after this step a
    mean cosine of clean images is near 0.

    Args:
        z: ``[..., D]``.
        reference: ``[N, D]``, usually the features of clean images.
        floor: no dimension is divided by less than this fraction of the root mean square of the standard
            deviations; otherwise one that is silent on the reference would outweigh all others.

    Returns:
        As ``z``. If the reference does not vary at all, ``z`` is centred only.
    """
    variance, mean = torch.var_mean(reference, dim=0, correction=0)
    least = floor * variance.mean().sqrt()
    scale = torch.maximum(variance.sqrt(), least)
    return (z - mean) / torch.where(scale > 0, scale, torch.ones_like(scale))


def debiased_linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment with the unbiased HSIC estimator.

    HSIC_1 of Song et al. (2012, "Feature selection via dependence maximization") on linear kernels, as in
    Nguyen et al. (2021, "Do wide and deep networks learn the same things?"), computed in feature space:
    O(N D E) time and no ``N x N`` kernel. Unlike with the biased estimate, independent features give 0 on
    average even if ``D`` is larger than ``N``.

    Args:
        x: ``[N, D]``.
        y: ``[N, E]``, row by row of the same images.

    Returns:
        A value in [-1, 1]: 1 if the two agree up to rotation, shift and scale; 0 if one of them is constant.

    Raises:
        ImageError: fewer than four rows, or different numbers of rows.
    """
    _require_pair(x, y, 4, "The debiased CKA")
    # A shift changes nothing, but centred data keep the sums below well conditioned.
    a, b = (z.double() - z.double().mean(0) for z in (x, y))
    own = (_unbiased_hsic(a, a) * _unbiased_hsic(b, b)).clamp_min(0).sqrt()
    tiny = torch.finfo(torch.float64).eps * a.square().sum() * b.square().sum() / len(a)
    return float(_unbiased_hsic(a, b) / own) if own > tiny else 0.0


def _unbiased_hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    diagonal_a, diagonal_b = a.square().sum(1), b.square().sum(1)
    sums_a, sums_b = a @ a.sum(0) - diagonal_a, b @ b.sum(0) - diagonal_b  # rows of the zero-diagonal kernels
    trace = (a.T @ b).square().sum() - diagonal_a @ diagonal_b
    product = sums_a.sum() * sums_b.sum() / ((n - 1) * (n - 2))
    return (trace + product - 2 / (n - 2) * (sums_a @ sums_b)) / (n * (n - 3))


def neighbour_overlap(x: Tensor, y: Tensor, k: int = 10) -> float:
    """The mean fraction of each row's ``k`` nearest rows by cosine that are the same in both spaces.

    Args:
        x: ``[N, D]``.
        y: ``[N, E]``, row by row of the same images.
        k: neighbours per row, itself left out; at most ``N - 1`` are used.

    Returns:
        A value in [0, 1]; unrelated spaces give ``k / (N - 1)`` on average.

    Raises:
        ImageError: fewer than two rows, or different numbers of rows.
    """
    _require_pair(x, y, 2, "A neighbour overlap")
    n, k = len(x), min(k, len(x) - 1)
    units = F.normalize(x, dim=1), F.normalize(y, dim=1)
    shared = 0
    for rows in torch.split(torch.arange(n, device=x.device), _CHUNK):
        inside = []
        for unit in units:
            cosine = unit[rows] @ unit.T
            cosine[torch.arange(len(rows), device=x.device), rows] = -torch.inf
            nearest = cosine.topk(k, dim=1).indices
            inside.append(torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, nearest, True))
        shared += int((inside[0] & inside[1]).sum())
    return shared / (n * k)


def embedding_map(z: Tensor) -> Tensor:
    """Two coordinates per row for a picture: the first two principal components, float32 ``[N, 2]``.

    A direction that does not exist (one row, one dimension, or no variation) is 0.
    """
    rows = z.detach().double().cpu()
    coordinates = torch.zeros(len(rows), 2)
    count = min(2, *rows.shape)
    if count and bool((rows != rows[0]).any()):
        found = PCA(n_components=count, svd_solver="full").fit_transform(rows.numpy())
        coordinates[:, :count] = torch.from_numpy(found).float()
    return coordinates


def _require_rows(found: int, least: int, purpose: str) -> None:
    if found < least:
        raise ImageError(f"{purpose} needs at least {least} images, found {found}; give more images.")


def _require_pair(x: Tensor, y: Tensor, least: int, purpose: str) -> None:
    if len(x) != len(y):
        raise ImageError(
            f"{purpose} compares features of the same images, but found {len(x)} and {len(y)} rows; "
            "extract both from one image set."
        )
    _require_rows(len(x), least, purpose)
