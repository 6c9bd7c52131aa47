"""What label-free repair of an encoder is made of: no class labels, so no cross-entropy.

The baselines were written for classifiers. In the place of the cross-entropy stand a contrastive loss on two
views (``Contrast``), the distance to the suspect's own clean features (``losses.cosine_distance``; safe
because the backdoor sleeps on clean images) and pseudo-classes; in the place of the validation accuracy, by
which they stop or choose a threshold, stands ``utility`` on clean images that were held out.
"""

from dataclasses import dataclass

import torch
from lightly.models.modules import SimCLRProjectionHead
from sklearn.cluster import KMeans
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.losses import nt_xent
from encoderguard.methods import History, require_images
from encoderguard.random import Rng, isolated
from encoderguard.run import Run
from encoderguard.similarity import neighbour_overlap
from encoderguard.training import Batch, Plan, train

__all__ = ["UTILITY_FLOOR", "Contrast", "PseudoClasses", "pseudo_classes", "split", "utility"]

UTILITY_FLOOR = 0.8
"""Overlap of neighbours below which a repaired encoder is taken to have lost too much (ours)."""


def split(images: ImageSet, rng: Rng, share: float = 0.2, least: int = 12) -> tuple[ImageSet, ImageSet]:
    """Images to repair with and images held out for ``utility``: a random ``share``, at least ``least``.

    Raises:
        ImageError: fewer than twice ``least`` images.
    """
    require_images(images, 2 * least, "Holding images out")
    order = rng.permutation(len(images), "held out")
    count = max(least, round(share * len(images)))
    return images.subset(order[count:]), images.subset(order[:count])


def utility(repaired: Encoder, suspect: Encoder, held_out: ImageSet, *, run: Run, k: int = 10) -> float:
    """The share of common images among the ``k`` nearest, in both encoders' features: 1 is unchanged."""
    both = [extract(encoder, held_out, run=run) for encoder in (repaired, suspect)]
    return neighbour_overlap(both[0], both[1], min(k, len(held_out) - 1))


@dataclass(frozen=True)
class PseudoClasses:
    """Clusters of the suspect's features of clean images, in the place of classes."""

    labels: Tensor
    """int64 ``[N]``."""
    centroids: Tensor
    """float32 ``[K, D]``."""


def pseudo_classes(features: Tensor, count: int, rng: Rng) -> PseudoClasses:
    """k-means on L2-normalised features ``[N, D]`` (k-means++, 4 starts).

    Raises:
        ImageError: fewer images than clusters.
    """
    if len(features) < count:
        raise ImageError(
            f"{count} clusters need at least {count} images, found {len(features)}; "
            "give more images or ask for fewer clusters."
        )
    rows = torch.nn.functional.normalize(features.float(), dim=1).cpu()
    fitted = KMeans(count, n_init=4, random_state=rng.integer("k-means") % 2**32).fit(rows.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    centroids = torch.stack([features[labels == k].float().mean(0) for k in range(count)])
    return PseudoClasses(labels, centroids)


class Contrast(nn.Module):
    """NT-Xent of two views behind a projection head of its own: a checkpoint seldom brings one."""

    def __init__(self, encoder: Encoder, run: Run, *, temperature: float = 0.5, dim: int = 128) -> None:
        super().__init__()
        self.temperature = temperature
        with isolated(run.rng.integer("contrast")):
            self.head = SimCLRProjectionHead(encoder.feature_dim, encoder.feature_dim, dim).to(run.device)

    def forward(self, encoder: nn.Module, batch: Batch) -> Tensor:
        """The loss of one step, scalar; the encoder sees both views in one pass."""
        return self.of_features(encoder(torch.cat(batch.views(SIMCLR))))

    def of_features(self, features: Tensor) -> Tensor:
        """The same from features ``[2 N, D]``: first all first views, then all second ones."""
        first, second = self.head(features).chunk(2)
        return nt_xent(first, second, self.temperature)

    def warm_up(self, encoder: Encoder, images: ImageSet, *, plan: Plan, run: Run) -> History:
        """Fit the head to the frozen ``encoder``, so that a fresh head does not damage it at first."""
        frozen = encoder.frozen().to(run.device)

        def loss(batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                features = frozen(torch.cat(batch.views(SIMCLR)))
            return {"nt_xent": self.of_features(features)}

        return train(self, loss, images, plan=plan, run=run.child("head"), task="fitting the head")
