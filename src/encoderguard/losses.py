"""Pure tensor functions, named after the papers' terms."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "attention_loss",
    "attention_map",
    "cosine_distance",
    "nt_xent",
    "random_directions",
    "sliced_wasserstein2",
]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """``1 - mean cos(a_i, b_i)`` of two ``[N, D]`` batches (MIMIC Eq. 4; BadEncoder's terms plus 1)."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean()


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (MIMIC Eq. 1): views ``a_i`` and ``b_i`` attract, the other ``2N - 2`` repel.

    Among processes that train together the others are those of all of them, with gradient: the mean of their
    losses is the loss of one process with all rows.

    Args:
        a: ``[N, D]`` projections of the first views.
        b: ``[N, D]`` projections of the second views.
        temperature: tau > 0.
    """
    from lightly.loss import NTXentLoss

    loss: Tensor = NTXentLoss(temperature=temperature, gather_distributed=True)(a.float(), b.float())
    return loss


def attention_map(stage: Tensor, p: int = 2) -> Tensor:
    """``sum_c |A_c|^p`` of ``[N, C, H, W]``, divided by its L2 norm: ``[N, HW]`` (MIMIC Eq. 6 and 7)."""
    # squares in the stage's own precision, summed in float32: converting first costs more
    powers = stage.square() if p == 2 else stage.abs().pow(p)
    return F.normalize(powers.sum(1, dtype=torch.float32).flatten(1), dim=1, eps=1e-6)


def attention_loss(student: Tensor, teacher: Tensor, *, reduction: str = "l2", p: int = 2) -> Tensor:
    """Distance of two stages' attention maps, averaged over the batch.

    Args:
        student: ``[N, C, H, W]``.
        teacher: ``[N, C', H, W]``.
        reduction: ``l2`` is Eq. 6 as printed, a norm per sample; ``mean`` is the authors' code, the squared
            difference averaged over the H x W places (so deep stages weigh more by the ratio of their areas);
            ``sum`` is that square summed over places, so that no stage weighs more for its size.
        p: order of Eq. 7.
    """
    difference = attention_map(student, p) - attention_map(teacher, p)
    if reduction == "mean":
        return difference.square().mean()
    if reduction == "sum":
        return difference.square().sum(1).mean()
    # the norm has no gradient at 0; the small constant keeps identical maps harmless
    return (difference.square().sum(1) + 1e-12).sqrt().mean()


def random_directions(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """``[count, dim]`` rows of length 1, uniform on the sphere, from a CPU ``generator``."""
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def sliced_wasserstein2(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Squared sliced 2-Wasserstein distance of two samples of one size (Bonneel et al. 2015).

    In one dimension the optimal plan pairs sorted values, so this is the mean, over directions and places, of
    the squared difference of the sorted projections (SSLDefender Eq. 7 with inverse distribution functions;
    no root, whose gradient explodes at 0).

    Args:
        a: ``[N, D]``.
        b: ``[N, D]``; which row is which in either does not matter.
        directions: ``[P, D]``, rows of length 1.
    """
    directions = directions.to(a.device).float()
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 projections would tie
        first, second = ((x.float() @ directions.T).sort(dim=0).values for x in (a, b))
    return F.mse_loss(first, second)
