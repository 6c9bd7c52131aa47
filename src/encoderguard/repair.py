"""What label-free repair of an encoder is made of: no class labels, so no cross-entropy.

The baselines were written for classifiers. In the place of the cross-entropy stand a contrastive loss on two
views (``Contrast``), the distance to the suspect's own clean features (``losses.cosine_distance``; safe
because the backdoor sleeps on clean images) and pseudo-classes; in the place of the validation accuracy, by
which they stop or choose a threshold, stands ``utility`` on clean images that were held out.
"""

import warnings
from dataclasses import dataclass

import torch
from lightly.models.modules import SimCLRProjectionHead
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError, NonFiniteError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.losses import nt_xent
from encoderguard.methods import History, require_images
from encoderguard.random import Rng, isolated
from encoderguard.run import Run
from encoderguard.similarity import neighbour_overlap
from encoderguard.training import Batch, Plan, train

__all__ = [
    "PRUNING_FLOOR",
    "UTILITY_FLOOR",
    "Contrast",
    "Gate",
    "PseudoClasses",
    "Repair",
    "begin",
    "pseudo_classes",
    "split",
    "utility",
]

UTILITY_FLOOR = 0.4
"""Overlap of neighbours below which a trained encoder is taken to have lost too much (ours).

Training moves neighbours that matter little: far fewer than .8 of them stayed on a BYOL encoder whose
accuracy it raised by a point, and a floor of .8 gave the backdoored suspect back. Chosen after a look at the
ACC and ASR of that encoder, whose figures are therefore optimistic."""
PRUNING_FLOOR = 0.8
"""The same where the method removes channels until the floor is met, and so spends all that it allows."""
_CONSTANT = 1e-5  # spread of features relative to their length


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
    """The share of common images among the ``k`` nearest, in both encoders' features: 1 is unchanged.

    ``k`` is at most a fifth of the images: among a dozen, ten neighbours would be almost all of them.
    """
    both = [extract(encoder, held_out, run=run) for encoder in (repaired, suspect)]
    return neighbour_overlap(both[0], both[1], _neighbours(len(held_out), k))


def _neighbours(count: int, k: int = 10) -> int:
    return max(1, min(k, count // 5))


class Gate:
    """Measures how much of the suspect's clean behaviour an encoder still has: 1 is all."""

    def __init__(self, suspect: Encoder, held_out: ImageSet, *, floor: float, run: Run) -> None:
        self.floor, self._held_out, self._run = floor, held_out, run
        self._features = extract(suspect, held_out, run=run)
        spread = (self._features - self._features.mean(0)).norm(dim=1).mean()
        if not spread > _CONSTANT * self._features.norm(dim=1).mean():
            raise EncoderError(
                f"The encoder gives the same features for all {len(held_out)} images held out of "
                f"{held_out.name}, so nothing in it can be repaired; check its weights and preprocessing."
            )

    def measure(self, encoder: Encoder) -> float:
        """As ``utility``, on the images held out; -1, below every floor, if features are not finite."""
        try:
            features = extract(encoder, self._held_out, run=self._run)
        except NonFiniteError:
            return -1.0
        return neighbour_overlap(features, self._features, _neighbours(len(features)))

    @property
    def images(self) -> ImageSet:
        """The images held out."""
        return self._held_out

    @property
    def count(self) -> int:
        """Images held out."""
        return len(self._held_out)


@dataclass(frozen=True)
class Repair:
    """What every repair starts from."""

    suspect: Encoder
    """Frozen, in eval mode, on the device."""
    images: ImageSet
    """To train on."""
    gate: Gate
    """On the images held out."""


def begin(
    encoder: Encoder, images: ImageSet, *, batch_size: int, floor: float, purpose: str, run: Run
) -> Repair:
    """Copy the suspect and hold a fifth of the images out.

    Args:
        encoder: unchanged.
        images: clean; no labels are looked at.
        batch_size: of the training that follows.
        floor: utility below which an encoder is not kept.
        purpose: begins the message of an error.
        run: surroundings; its seed decides which images are held out.

    Raises:
        ImageError: fewer images than a batch beside those held out.
        EncoderError: the encoder's features do not depend on the image.
        NonFiniteError: its features are NaN or infinite.
    """
    least = max(24, batch_size + 12, -(-batch_size * 5 // 4))
    require_images(images, least, f"{purpose} in batches of {batch_size}, with a fifth held out,")
    used, held_out = split(images, run.rng)
    suspect = encoder.frozen().to(run.device)
    return Repair(suspect, used, Gate(suspect, held_out, floor=floor, run=run))


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
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # said below
        fitted = KMeans(count, n_init=4, random_state=rng.integer("k-means") % 2**32).fit(rows.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    if (distinct := len(set(labels.tolist()))) < count:
        raise ImageError(
            f"{count} clusters need as many different images, and the encoder tells only {distinct} of the "
            f"{len(features)} apart; give other images or ask for fewer clusters."
        )
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
