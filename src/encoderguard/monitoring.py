"""kNN accuracy of an encoder while it is trained: a labelled pair of clean sets, no fit, no random draw."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from encoderguard.classifiers import KNNClassifier
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.run import Run

__all__ = ["KNNMonitor"]


@dataclass(frozen=True, kw_only=True)
class KNNMonitor:
    """Share of ``test`` whose label the nearest pictures of ``train`` vote for (k and tau as CTRL's monitor).

    Raises:
        ImageError: one of the sets has no labels.
    """

    train: ImageSet
    """Labelled pictures that vote."""
    test: ImageSet
    """Labelled pictures to judge by."""
    run: Run
    """Device and precision."""
    every: int = 1
    """Epochs from one measurement to the next."""
    k: int = 200
    """Voters; all of ``train`` if it holds fewer."""
    temperature: float = 0.1
    """tau of the votes' weights, ``exp(cos / tau)``."""

    def __post_init__(self) -> None:
        """Check that both sets have labels."""
        for images in (self.train, self.test):
            if images.labels is None:
                raise ImageError(
                    f"The kNN monitor needs labels, {images.name} has none; give labelled images."
                )

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """``{"knn": accuracy}``; the encoder keeps its weights and modes."""
        # a stop is for the training loop to act on: it saves first
        run = replace(self.run.silent(), checkpoint=None)
        bank = F.normalize(extract(encoder, self.train, run=run), dim=1)
        assert self.train.labels is not None
        assert self.test.labels is not None
        classes = 1 + int(torch.cat([self.train.labels, self.test.labels]).max())
        k = min(self.k, len(bank))
        voters = KNNClassifier(
            bank.to(run.device), self.train.labels.to(run.device), classes, k, self.temperature
        )
        right = voters.predict(extract(encoder, self.test, run=run)) == self.test.labels
        return {"knn": float(right.float().mean())}
