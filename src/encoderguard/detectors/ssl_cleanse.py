"""SSL-Cleanse: an encoder is suspect if one cluster is reached by a far smaller trigger than the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from encoderguard.cluster_search import ClusterPlan, search_clusters
from encoderguard.clusters import Clusters, outlier_indices
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import Detection, Detector, Verdict
from encoderguard.registry import register
from encoderguard.run import Run

__all__ = ["SSLCleanse", "cluster_indices"]

_FEWEST_SIZES = 8
"""With fewer sizes an outlier index says nothing: of three values the middle one is the median (ours)."""


@final
@register
@dataclass(frozen=True, kw_only=True)
class SSLCleanse(Detector):
    """Zheng et al. 2024: smallest trigger per cluster of clean images, then the outlier among their sizes.

    Departures: cosines to all centroids in a softmax, on standardised features, instead of the distance to
    one; all clusters are searched in one batch with one schedule. From the authors' code: the outlier index
    is ``(median - size) / (1.4826 MAD)`` and not also divided by .6745; every cluster keeps its own trigger;
    the smallest is flagged only beyond the threshold; fewer than eight clusters carry no verdict, and one
    that no trigger reached counts as large.
    """

    name: ClassVar[str] = "ssl_cleanse"
    paper: ClassVar[str] = (
        "Zheng et al., SSL-Cleanse: Trojan Detection and Mitigation in Self-Supervised Learning, ECCV 2024, "
        "arXiv:2303.09079"
    )
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a search per cluster: forward and backward passes through the frozen encoder"
    blind_spots: ClassVar[str] = (
        "Triggers that cover the image, several backdoors at once (they raise each other's median), and "
        "images with too few natural groups to compare."
    )

    clusters: Clusters | None = None
    """Clusters of clean images; None takes the elbow of the k-means cost from ``fewest`` to ``most``."""
    fewest: Clusters = 8
    """From here on an elbow is looked for."""
    most: Clusters = 24
    """Up to here; never more than a quarter of the images."""
    threshold: Annotated[float, Field(gt=0)] = 2.0
    """Robust standard deviations below the median from which a size is an outlier."""
    success: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Share of the other clusters' images that a trigger must move."""
    neighbours: Annotated[int, Field(ge=1)] = 10
    """Clean images that vote on where a stamped one belongs."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Steps of the search, all clusters at once."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per step and cluster."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of Adam."""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder`` from clean unlabelled images; ``score`` is the outlier index, large if suspect.

        It is 0 if no cluster was reached.

        Raises:
            ImageError: fewer images than clusters.
            EncoderError: the features do not depend on the image.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        search = search_clusters(encoder, images, self._plan(), run=run.child(self.name))
        indices = cluster_indices([entry.size for entry in search.found])
        score, reached = max(indices), sum(entry.size is not None for entry in search.found)
        worst = search.found[indices.index(score)] if reached else None
        verdict, reason = self._judge(score, reached, len(search.found))
        return Detection(
            verdict=verdict,
            score=score,
            threshold=self.threshold,
            trigger=None if worst is None else worst.trigger,
            evidence={
                "reason": reason,
                "flagged": "above",
                "cluster": None if worst is None else worst.cluster,
                "outlier_indices": indices,
                **search.evidence,
                "tested": [
                    f"Whether one of {len(search.found)} clusters of the given images is reached by a far "
                    "smaller trigger than the others."
                ],
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

    def _judge(self, score: float, reached: int, clusters: int) -> tuple[Verdict, str]:
        if clusters < _FEWEST_SIZES:
            return "inconclusive", f"an outlier among fewer than {_FEWEST_SIZES} clusters says nothing"
        if 4 * reached < 3 * clusters:  # those not reached count as the largest: of many, nothing spreads
            return "inconclusive", (
                f"a trigger was found for {reached} of {clusters} clusters only; give more steps or images"
            )
        verdict: Verdict = "backdoored" if score > self.threshold else "clean"
        place = "above" if verdict == "backdoored" else "not above"
        return verdict, f"the smallest of {clusters} masks has index {score:.2f}, {place} {self.threshold:g}"


def cluster_indices(sizes: Sequence[float | None]) -> list[float]:
    """The outlier index of each cluster's mask; one that was not reached is as large as the largest found.

    All are 0 if none was reached.
    """
    largest = max((size for size in sizes if size is not None), default=1.0)
    return outlier_indices(torch.tensor([largest if size is None else size for size in sizes])).tolist()
