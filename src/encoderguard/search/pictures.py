"""The clean images of a trigger search."""

import torch

from encoderguard.images import ImageSet
from encoderguard.run import Run

__all__ = ["Images", "are_grey"]


class Images:
    """The clean images, split into those searched with and those measured on."""

    def __init__(self, images: ImageSet, count: int, run: Run) -> None:
        order = run.rng.permutation(len(images), "trigger search")
        count = min(count, len(images) // 2)
        self.images = images
        self.order = order[count : 2 * count]
        self.searched, self.held_out = images.subset(order[:count]), images.subset(self.order)
        self.grey = are_grey(self.searched)


def are_grey(images: ImageSet) -> bool:
    """Whether all channels of all images are the same but for rounding: colours are then left out."""
    pixels = images.take(torch.arange(len(images))).short()
    return int((pixels.amax(1) - pixels.amin(1)).max()) <= 2
