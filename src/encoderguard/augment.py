"""SimCLR's augmentation, per sample, on whole batches, on the device the batch is on.

The crop, the flip and the resampling are one ``grid_sample``; the colour operations are those of
torchvision's ``ColorJitter`` (same factors and formulas, hue in HSV) in a fixed order instead of a random one
per image. That keeps it a few per cent of a training step on a CPU (``benchmarks/step_speed.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SIMCLR", "SIMCLR_NO_CROP", "Augmentation", "adjust_hue", "random_patches"]

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random views of ``[N, 3, H, W]`` images in [0, 1]; every sample gets its own draw."""

    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    """Range of the crop's share of the area; None keeps the whole image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed."""
    grey: float = 0.2
    """Probability of a grey image."""

    def __call__(
        self, images: Tensor, generator: torch.Generator, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """One view per image: same range and device, and same height and width unless ``size`` says others.

        Draws come from the CPU ``generator``. A crop's aspect ratio is in pixels of the image.
        """
        n = images.shape[0]
        draws = torch.rand((12, n), generator=generator).to(images.device)
        views = self._geometry(images, draws, size or (images.shape[-2], images.shape[-1]))
        return self._colours(views, draws)

    def _geometry(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        mirror = torch.where(draws[0] < self.flip, -1.0, 1.0)
        if self.crop_scale is None:
            views = torch.where((mirror < 0).view(-1, 1, 1, 1), images.flip(-1), images)
            same = tuple(images.shape[-2:]) == size
            return views if same else F.interpolate(views, size, mode="bilinear", align_corners=False)
        low, high = self.crop_scale
        area = low + (high - low) * draws[1]
        log_low, log_high = (torch.tensor(r).log().item() for r in self.crop_ratio)
        ratio = (log_low + (log_high - log_low) * draws[2]).exp()
        ratio = ratio * (images.shape[-2] / images.shape[-1])  # of the shares of the two sides
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        theta = torch.zeros(len(images), 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
        theta[:, 0, 2] = (1 - width) * (2 * draws[3] - 1)
        theta[:, 1, 2] = (1 - height) * (2 * draws[4] - 1)
        grid = F.affine_grid(theta, [len(images), 3, *size], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def _colours(self, views: Tensor, draws: Tensor) -> Tensor:
        chosen = draws[5] < self.jitter

        def factor(row: int, strength: float) -> Tensor:
            drawn = 1 + strength * (2 * draws[row] - 1)
            return torch.where(chosen, drawn, torch.ones_like(drawn)).view(-1, 1, 1, 1)

        views = (views * factor(6, self.brightness)).clamp_(0, 1)
        contrast, saturation = factor(7, self.contrast), factor(8, self.saturation)
        mean = _luma(views).mean((2, 3), keepdim=True)
        views = (views * contrast + mean * (1 - contrast)).clamp_(0, 1)
        luma = _luma(views)
        views = (views * saturation + luma * (1 - saturation)).clamp_(0, 1)
        if self.hue > 0:
            picked = chosen.nonzero().squeeze(1)
            shift = self.hue * (2 * draws[9, picked] - 1)
            views = views.index_copy(0, picked, adjust_hue(views[picked], shift))
        grey = (draws[10] < self.grey).view(-1, 1, 1, 1)
        return torch.where(grey, _luma(views).expand_as(views), views)


SIMCLR = Augmentation()
"""SimCLR at 32 px as BadEncoder and MIMIC use it: crop .08-1, flip, jitter p=.8, grey p=.2, no blur."""
SIMCLR_NO_CROP = Augmentation(crop_scale=None)
"""What BadEncoder applies to its reference images."""


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).unsqueeze(1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each image by its own share of the colour circle, as torchvision's ``adjust_hue``.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        shift: ``[N]`` in [-.5, .5].
    """
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    scale = 1 / chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = hue + 6 * shift.view(-1, 1, 1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (hue.unsqueeze(1) + offsets) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def random_patches(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Cover a random rectangle of some images with one random colour (random erasing, Zhong et al. 2020).

    Sides are 1/8 to 1/2 of the image's, places and colours uniform; nothing is taken from any trigger.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1]; unchanged.
        probability: share of the images that get a patch.
        generator: CPU generator of all draws.
    """
    if probability == 0:
        return images
    n, _, height, width = images.shape
    draws = torch.rand((8, n), generator=generator).to(images.device)
    inside = torch.ones(n, height, width, dtype=torch.bool, device=images.device)
    for row, length in ((0, height), (2, width)):
        side = (0.125 + 0.375 * draws[row]) * length
        start = draws[row + 1] * (length - side)
        places = torch.arange(length, device=images.device) + 0.5
        within = (places >= start[:, None]) & (places < (start + side)[:, None])
        inside = inside & (within[:, :, None] if row == 0 else within[:, None, :])
    inside = inside & (draws[4] < probability)[:, None, None]
    colours = draws[5:8].T[:, :, None, None]
    return torch.where(inside[:, None], colours, images)
