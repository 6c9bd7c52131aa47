"""SSL-Cleanse as a filter: which training images lie where a recovered trigger leads, and look like it?"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoderguard.cluster_search import ClusterPlan, ClusterTrigger, search_clusters
from encoderguard.clusters import Clusters
from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Filter, Ranking
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.similarity import standardise
from encoderguard.triggers import MaskedPattern

__all__ = ["SSLCleanseFilter", "closeness_to_patch", "ranks"]

_TOP = 100
"""Indices that the evidence lists."""


@final
@register
@dataclass(frozen=True, kw_only=True)
class SSLCleanseFilter(Filter):
    """The search of Zheng et al. 2024 on a sample; then images near the trigger's collapse that look like it.

    The paper detects and repairs encoders, it has no filter; this one is ours. The trigger of the cluster
    whose mask is smallest among all decides. Each image has two ranks: the cosine of its features to the
    mean of the stamped images' features, and how closely any place of it matches the recovered pattern. The
    score is their mean, so that an image must stand out in both to come first.
    """

    name: ClassVar[str] = "ssl_cleanse"
    paper: ClassVar[str] = (
        "After Zheng et al., SSL-Cleanse: Trojan Detection and Mitigation in Self-Supervised Learning, "
        "ECCV 2024, arXiv:2303.09079"
    )
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "the training set and the encoder trained on it"
    cost: ClassVar[str] = "a search per cluster on a sample, then one pass over the training set"
    blind_spots: ClassVar[str] = (
        "Poison that looks unlike the recovered pattern, such as waves and pairs of crops, and training sets "
        "of encoders that were tampered with afterwards."
    )

    clusters: Clusters | None = None
    """Clusters of the sample; None takes the elbow of the k-means cost from ``fewest`` to ``most``."""
    fewest: Clusters = 8
    """From here on an elbow is looked for."""
    most: Clusters = 24
    """Up to here; never more than a quarter of the sample."""
    success: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Share of the other clusters' images that a trigger must move."""
    neighbours: Annotated[int, Field(ge=1)] = 10
    """Images of the sample that vote on where a stamped one belongs."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Steps of the search, all clusters at once."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per step and cluster."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of Adam."""
    sample: Annotated[int, Field(ge=8)] = 1000
    """Training images that are searched with, drawn with the seed; most of them must be clean."""

    def rank(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Ranking:
        """Score every image in [0, 1]; without any recovered trigger all scores are 0.

        Raises:
            ImageError: fewer images than clusters.
            EncoderError: the features do not depend on the image.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        run = run.child(self.name)
        order = run.rng.permutation(len(images), "sample")[: self.sample]
        some = ImageSet.from_arrays(images.take(order), name=images.name)
        search = search_clusters(encoder, some, self._plan(), run=run)
        worst = smallest(search.found)
        if worst is None or worst.trigger is None:
            reason = (
                "no cluster was reached by a verified trigger, so no image is more suspicious than another"
            )
            return Ranking(scores=torch.zeros(len(images)), evidence={"reason": reason, **search.evidence})
        near = _nearness(encoder, images, some, worst.trigger, search.clean, run)
        alike = torch.cat([closeness_to_patch(part, worst.trigger) for part in images.float_batches(256)])
        scores = (ranks(near) + ranks(alike)) / 2
        return Ranking(
            scores=scores,
            evidence={
                "cluster": worst.cluster,
                "mask_size": worst.size,
                **search.evidence,
                "top": scores.argsort(descending=True, stable=True)[:_TOP].tolist(),
            },
        )

    def _plan(self) -> ClusterPlan:
        return ClusterPlan(
            clusters=self.clusters,
            fewest=self.fewest,
            most=self.most,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            success=self.success,
            neighbours=self.neighbours,
        )


def smallest(found: tuple[ClusterTrigger, ...]) -> ClusterTrigger | None:
    """The cluster that is reached by the smallest mask; None if none is."""
    reached = [entry for entry in found if entry.size is not None]
    return min(reached, key=lambda entry: entry.size or 0.0, default=None)


def ranks(values: Tensor) -> Tensor:
    """The share of the *other* values that each of ``[N]`` exceeds, in [0, 1]; equals get the same."""
    ordered = values.sort().values.contiguous()
    return torch.searchsorted(ordered, values.contiguous()).float() / max(1, len(values) - 1)


def closeness_to_patch(images: Tensor, trigger: MaskedPattern) -> Tensor:
    """How well the best place of each image matches the part of the pattern under the mask.

    The mask is cut to the box of its values above half of its largest; at each place the mean squared
    difference to the pattern, weighted by the mask, is taken over the box.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        trigger: of the images' size or smaller.

    Returns:
        ``[N]`` in [0, 1]: 1 minus the root of the smallest such mean.
    """
    inside = trigger.mask > trigger.mask.max() / 2
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    weight = trigger.mask[box].double().expand(1, 3, -1, -1)
    weight, pattern = weight / weight.sum(), trigger.pattern[(slice(None), *box)].double()[None]
    pixels = images.double().cpu()
    squares = F.conv2d(pixels.square(), weight) - 2 * F.conv2d(pixels, weight * pattern)
    errors = squares + (weight * pattern.square()).sum()
    return (1 - errors.flatten(1).amin(1).clamp_min(0).sqrt()).float()


def _nearness(
    encoder: Encoder, images: ImageSet, some: ImageSet, trigger: MaskedPattern, clean: Tensor, run: Run
) -> Tensor:
    """The cosine ``[N]`` of each image's features to where stamped images of the sample end up."""
    stamped = standardise(extract(encoder, some, run=run, trigger=trigger), clean)
    point = F.normalize(stamped, dim=1).mean(0)
    features = standardise(extract(encoder, images, run=run), clean)
    return F.cosine_similarity(features, point[None], dim=1)
