"""How far a trigger moves features, and how alike it makes those of different images.

Collapse is the mean cosine over pairs of different stamped images, with features standardised over the clean
images: near 0 for clean images, 1 when all stamped images have the same features. Displacement is 1 minus
the mean cosine of an image's features with those of its stamped copy, in the same space: 0 where a trigger
changes nothing. A backdoor that spreads triggered images on purpose collapses little, but it must move them.
A strong change of all images does both to any encoder: both mean something only beside clean encoders.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.encoder import Encoder
from encoderguard.errors import NonFiniteError
from encoderguard.folding import fast_frozen
from encoderguard.images import ImageSet
from encoderguard.methods import require_images
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine, standardise

__all__ = ["Collapse", "Reading", "Stamp"]

Stamp = Callable[[Tensor], Tensor]
"""Stamped from clean images: a trigger, or what makes one when it is called."""

_BATCH = 256


class Reading(NamedTuple):
    """What one trigger does to the features."""

    collapse: float
    """In [-1 / (N - 1), 1]."""
    displacement: float
    """In [0, 2]."""


class Collapse:
    """Measures triggers on one encoder and one set of images; the encoder is unchanged.

    Attributes:
        encoder: a frozen, faster copy on the run's device.
        pixels: the images, float32 ``[N, 3, H, W]`` on the run's device.
        clean: their features, float32 ``[N, D]``.
    """

    def __init__(self, encoder: Encoder, images: ImageSet, *, run: Run, exact: bool = False) -> None:
        """Hold the images in memory and take their features.

        Args:
            encoder: what triggers are measured on.
            images: at least two clean images.
            run: device and precision.
            exact: float32 whatever the run says.

        Raises:
            ImageError: fewer than two images.
            NonFiniteError: a feature of a clean image is NaN or infinite.
        """
        require_images(images, 2, "Measuring a collapse")
        self.run = replace(run, precision="float32") if exact else run
        self.pixels = images.take(torch.arange(len(images))).to(run.device).float() / 255
        self.encoder, _ = fast_frozen(encoder, self.pixels[:8], self.run)
        self.images_passed = 0
        self.clean = self._features(self.pixels)
        if not bool(self.clean.isfinite().all()):
            raise NonFiniteError(f"Features of clean images of {images.name} are not finite.")

    def objective(self, features: Tensor) -> Tensor:
        """``[R, B, D]`` to minus the collapse ``[R]``, differentiable."""
        return -mean_pairwise_cosine(standardise(features, self.clean))

    def of(
        self, triggers: Sequence[Stamp], *, count: int | None = None, deadline: float = float("inf")
    ) -> list[float]:
        """The collapse under each trigger; arguments and errors as those of ``measure``."""
        return [reading.collapse for reading in self.measure(triggers, count=count, deadline=deadline)]

    def measure(
        self, triggers: Sequence[Stamp], *, count: int | None = None, deadline: float = float("inf")
    ) -> list[Reading]:
        """Collapse and displacement by trigger; fewer than ``triggers`` if the deadline came first.

        Args:
            triggers: measured in their order.
            count: images to measure on, the first ones; None takes all.
            deadline: of ``time.monotonic``; at least one batch is measured.

        Raises:
            NonFiniteError: a feature is NaN or infinite.
            Stopped: the user asked to stop.
        """
        images = self.pixels[:count]
        together = max(1, _BATCH // len(images))
        clean = standardise(self.clean[:count], self.clean)
        found: list[Reading] = []
        for first in range(0, len(triggers), together):
            if found and time.monotonic() > deadline:
                break
            self.run.check_stop()
            stamped = torch.cat([trigger(images) for trigger in triggers[first : first + together]])
            features = self._features(stamped)
            z = standardise(features.reshape(-1, len(images), features.shape[1]), self.clean)
            alike, moved = mean_pairwise_cosine(z), 1 - F.cosine_similarity(z, clean, dim=-1).mean(-1)
            if not bool((alike + moved).isfinite().all()):
                raise NonFiniteError("Features of stamped images are not finite.")
            found += map(Reading, alike.tolist(), moved.tolist())
        return found

    def nearest(self, trigger: Stamp, count: int) -> tuple[Tensor, Tensor]:
        """The clean images whose features point most in the direction that stamped images collapse to.

        Returns:
            Their indices ``[count]``, most alike first, and their cosines to the mean stamped feature.
        """
        stamped = self._features(trigger(self.pixels))
        point = F.normalize(standardise(stamped, self.clean), dim=1).mean(0)
        cosines = F.cosine_similarity(standardise(self.clean, self.clean), point[None], dim=1)
        best = cosines.topk(min(count, len(cosines)))
        return best.indices.cpu(), best.values.cpu()

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        self.images_passed += len(images)
        found = []
        for part in torch.split(images, _BATCH):
            with self.run.autocast():
                found.append(self.encoder(part).float())
        return torch.cat(found)
