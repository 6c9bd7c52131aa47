"""Random disturbances of images, which a student sees and its teacher does not: patches and noise.

Nothing is taken from any trigger.
"""

import torch
from torch import Tensor

from encoderguard.peers import ALONE, Peers

__all__ = ["random_noise", "random_patches"]

_CELLS = 4
"""The most cells a side of a random patch."""


def random_patches(
    images: Tensor, probability: float, generator: torch.Generator, *, peers: Peers = ALONE, views: int = 1
) -> Tensor:
    """Cover a random rectangle of some images with random colours (after random erasing, Zhong et al. 2020).

    Sides are 1/8 to 1/2 of the image's, places uniform. A patch is a grid of 1, 2 or 4 cells a side, each of
    one uniform colour; in every second patch the channels are rounded to 0 and 1, because uniform
    colours are hardly ever as strong as white or black.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1]; unchanged.
        probability: share of the images that get a patch.
        generator: CPU generator of all draws.
        peers: the processes of which ``images`` is one's share.
        views: how many views of the share are stacked in ``images``.
    """
    if probability == 0:
        return images
    n, _, height, width = images.shape
    draws = peers.rand(7 + 3 * _CELLS**2, n, generator, views=views).to(images.device)
    cells = 2 ** (3 * draws[5]).long()
    colours = draws[7:].T.reshape(n, 3, _CELLS, _CELLS)
    colours = torch.where((draws[6] < 0.5)[:, None, None, None], colours.round(), colours)
    down = _within(draws[0], draws[1], height)
    across = _within(draws[2], draws[3], width)
    # the cell of each row and column: [N, H] and [N, W]
    rows, columns = ((part.clamp(0, 0.999) * cells[:, None]).long() for part in (down, across))
    painted = colours[
        torch.arange(n, device=images.device)[:, None, None, None],
        torch.arange(3, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    inside = ((down >= 0) & (down < 1))[:, :, None] & ((across >= 0) & (across < 1))[:, None, :]
    chosen = inside & (draws[4] < probability)[:, None, None]
    return torch.where(chosen[:, None], painted.to(images.dtype), images)


def random_noise(
    images: Tensor, probability: float, generator: torch.Generator, *, peers: Peers = ALONE, views: int = 1
) -> Tensor:
    """Blend noise into some images: uniform per pixel, grey in every second, with a weight of 0 to 1/2.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1]; unchanged.
        probability: share of the images that get noise.
        generator: CPU generator of all draws.
        peers: the processes of which ``images`` is one's share.
        views: how many views of the share are stacked in ``images``.
    """
    if probability == 0:
        return images
    n, _, height, width = images.shape
    draws = peers.rand(3 + 3 * height * width, n, generator, views=views).to(images)
    noise = draws[3:].T.reshape(n, 3, height, width)
    noise = torch.where((draws[2] < 0.5)[:, None, None, None], noise[:, :1], noise)
    weight = (draws[1] / 2 * (draws[0] < probability))[:, None, None, None]
    return images + weight * (noise - images)


def _within(side: Tensor, start: Tensor, length: int) -> Tensor:
    """Where each pixel lies in a span of 1/8 to 1/2 of ``length``, which begins at 0 and ends at 1."""
    span = (0.125 + 0.375 * side) * length
    places = torch.arange(length, device=side.device) + 0.5
    return (places - (start * (length - span))[:, None]) / span[:, None]
