"""Random views, per sample, on whole batches, on the device the batch is on.

The crop, the flip and the resampling are one ``grid_sample``; the colour operations are those of
torchvision's ``ColorJitter`` (same factors and formulas, hue in HSV) in a fixed order instead of a random one
per image. That keeps it a few per cent of a training step on a CPU (``benchmarks/step_speed.py``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.peers import ALONE, Peers

__all__ = [
    "AUGMENTATIONS",
    "LIGHT",
    "SIMCLR",
    "SIMCLR_NO_CROP",
    "Augmentation",
    "AugmentationName",
    "adjust_hue",
    "gaussian_blur",
]

AugmentationName = Literal["badencoder", "ctrl", "moco_v2", "byol"]

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
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    pad: int = 0
    """Without a crop: pixels of black border from which a window of the image's size is cut at random."""

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        size: tuple[int, int] | None = None,
        peers: Peers = ALONE,
    ) -> Tensor:
        """One view per image: same range and device, and same height and width unless ``size`` says others.

        Draws come from the CPU ``generator``. A crop's aspect ratio is in pixels of the image. Where
        ``peers`` are several, ``images`` is this one's share.
        """
        draws = peers.rand(12, len(images), generator).to(images.device)
        views = self._geometry(images, draws, size or (images.shape[-2], images.shape[-1]))
        if self.jitter > 0 or self.grey > 0:
            views = self._colours(views, draws)
        return self._blurred(views, generator, peers) if self.blur > 0 else views

    def _blurred(self, views: Tensor, generator: torch.Generator, peers: Peers) -> Tensor:
        draws = peers.rand(2, len(views), generator)
        picked = (draws[0] < self.blur).nonzero().squeeze(1)
        low, high = self.sigma
        sigma = (low + (high - low) * draws[1, picked]).to(views.device)
        picked = picked.to(views.device)
        return views.index_copy(0, picked, gaussian_blur(views[picked], sigma))

    def _geometry(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        mirror = torch.where(draws[0] < self.flip, -1.0, 1.0)
        if self.crop_scale is None:
            shifted = _shift(images, draws[3:5], self.pad) if self.pad else images
            views = torch.where((mirror < 0).view(-1, 1, 1, 1), shifted.flip(-1), shifted)
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
_CTRL = Augmentation(crop_scale=(0.2, 1.0))
_MOCO_V2 = Augmentation(crop_scale=(0.2, 1.0), blur=0.5)
_BYOL = Augmentation(crop_scale=(0.2, 1.0), grey=0.1, blur=0.5)
AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "badencoder": SIMCLR,
    "ctrl": _CTRL,
    "moco_v2": _MOCO_V2,
    "byol": _BYOL,
}
"""By whose code has them: BadEncoder and CTRL (no blur), MoCo v2 and SSL-Backdoor's BYOL (blur p=.5)."""
LIGHT = Augmentation(crop_scale=None, jitter=0, grey=0, pad=4)
"""What classifiers of small images are trained with: a shift by up to 4 px, flip."""


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).unsqueeze(1)


def _shift(images: Tensor, draws: Tensor, pad: int) -> Tensor:
    """Each image moved by whole pixels, -pad to pad in each direction, black where it came from."""
    n, _, height, width = images.shape
    down, right = ((draws * (2 * pad + 1)).long().clamp_(max=2 * pad)).unbind(0)
    rows = (torch.arange(height, device=images.device) + down[:, None])[:, :, None]
    columns = (torch.arange(width, device=images.device) + right[:, None])[:, None, :]
    sample = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image blurred with its own Gaussian; at the border the weights inside the image sum to 1.

    Two batched matrix products: every row, then every column, times a band matrix.

    Args:
        images: ``[N, 3, H, W]``.
        sigma: ``[N]``, standard deviations in pixels, above 0.
    """
    n, channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):
        across = images.float().reshape(n, channels * height, width) @ _gaussian(width, sigma)
        down = _gaussian(height, sigma).unsqueeze(1).mT @ across.view(n, channels, height, width)
    return down


def _gaussian(side: int, sigma: Tensor) -> Tensor:
    """``[N, side, side]``: column j holds the weights of the pixels that make pixel j."""
    places = torch.arange(side, device=sigma.device, dtype=torch.float32)
    distance = (places[:, None] - places[None, :]).square()
    weights = (-distance / (2 * sigma.float().square().view(-1, 1, 1))).exp()
    return weights / weights.sum(1, keepdim=True)


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
