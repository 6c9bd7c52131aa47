"""SSL-Cleanse's search: for every cluster of clean images the smallest trigger that moves others into it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.clusters import elbow_of_features, neighbour_votes, require_spread
from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.inversion import SearchPlan, invert
from encoderguard.methods import require_images
from encoderguard.penalty import LambdaRule
from encoderguard.repair import PseudoClasses, pseudo_classes
from encoderguard.run import Run
from encoderguard.similarity import standardise
from encoderguard.triggers import MaskedPattern

__all__ = ["ClusterPlan", "ClusterSearch", "ClusterTrigger", "search_clusters", "share_moved"]

_TEMPERATURE = 0.1
"""Of the softmax over cosines to the centroids; ours."""
_KEEP, _SPACING = 8, 0.85
"""Candidates per cluster, and the factor between the sizes of neighbouring ones."""
_POWERS = (0.8, 0.6, 0.4)
"""Of the largest mask, tried one after another if no candidate holds on all images."""


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """The settings of a search."""

    clusters: int | None
    """None takes the elbow from ``fewest`` to ``most``."""
    fewest: int
    most: int
    steps: int
    batch_size: int
    learning_rate: float
    success: float
    """Share of the other clusters' images that a trigger must move for its mask to count."""
    neighbours: int


@dataclass(frozen=True, kw_only=True)
class ClusterTrigger:
    """What was found for one cluster."""

    cluster: int
    images: int
    """Clean images in the cluster."""
    trigger: MaskedPattern | None
    """The smallest one that was verified on all images; None if none was."""
    size: float | None
    """The mean of its mask."""
    share: float
    """Of the other clusters' images it moved, or of the best that failed."""


@dataclass(frozen=True, kw_only=True)
class ClusterSearch:
    """What was found for all clusters."""

    clean: Tensor
    """Features of the clean images, float32 ``[N, D]`` on the CPU."""
    classes: PseudoClasses
    """Clusters of the standardised features."""
    found: tuple[ClusterTrigger, ...]
    """One per cluster, in their order."""
    evidence: dict[str, Any]
    """JSON values."""


def search_clusters(encoder: Encoder, images: ImageSet, plan: ClusterPlan, *, run: Run) -> ClusterSearch:
    """Cluster clean images and look for the smallest trigger towards each cluster, all in one batch.

    Clusters, centroids and neighbours are taken of standardised features: features behind a ReLU are all
    alike before. The search minimises the cross-entropy of a softmax over cosines to the centroids; what
    counts is measured afterwards in float32 by the votes of the nearest clean images.

    Args:
        encoder: unchanged.
        images: clean images; no labels are looked at.
        plan: see ClusterPlan.
        run: surroundings.

    Raises:
        ImageError: fewer images than clusters.
        EncoderError: the features do not depend on the image.
        NonFiniteError: features or loss are NaN or infinite.
        Stopped: the user asked to stop.
    """
    require_images(images, plan.clusters or plan.fewest, "A trigger search in clusters")
    exact = replace(run, precision="float32")
    clean = extract(encoder, images, run=exact)
    require_spread(clean, images.name)
    z = standardise(clean, clean)
    count, costs = plan.clusters, list[float]()
    if count is None:
        count, costs = elbow_of_features(z, plan.fewest, plan.most, run.rng.child("clusters"))
    classes = pseudo_classes(z, count, run.rng.child("clusters"))
    reference = clean.to(run.device)
    inversion = invert(
        encoder, images, _towards(reference, classes), _search_plan(plan, count), run=run.child("inversion")
    )
    found = []
    for cluster, kept in enumerate(inversion.candidates):
        run.check_stop()
        triggers = [candidate.trigger for candidate in kept]
        found.append(_smallest(encoder, images, cluster, triggers, clean, classes, plan, exact))
    return ClusterSearch(
        clean=clean,
        classes=classes,
        found=tuple(found),
        evidence={
            "clusters": count,
            "elbow_costs": costs,
            "image_passes": inversion.image_passes,
            "found": [_told(entry) for entry in found],
        },
    )


def share_moved(votes: Tensor, own: Tensor, cluster: int) -> float:
    """The share of images of *other* clusters (``own``, int64 ``[N]``) that are voted into ``cluster``.

    1 if there is no image of another cluster.
    """
    others = own != cluster
    return float((votes[others] == cluster).double().mean()) if bool(others.any()) else 1.0


def _search_plan(plan: ClusterPlan, count: int) -> SearchPlan:
    return SearchPlan(
        goal=-math.log((1 + plan.success) / 2),  # a batch flatters
        restarts=count,
        batch_sizes=((0, plan.batch_size),),
        max_steps=plan.steps,
        learning_rates=((0, plan.learning_rate),),
        penalty=LambdaRule(initial=1e-3, factor=1.5),
        stale_steps=plan.steps,  # nobody leaves early: restart k is cluster k throughout
        keep=_KEEP,
        spacing=_SPACING,
    )


def _towards(clean: Tensor, classes: PseudoClasses) -> Callable[[Tensor], Tensor]:
    z = F.normalize(standardise(clean, clean), dim=1)
    labels = classes.labels.to(z.device)
    centroids = torch.stack([z[labels == k].mean(0) for k in range(len(classes.centroids))])
    unit = F.normalize(centroids, dim=1)

    def loss(features: Tensor) -> Tensor:
        cosines = F.normalize(standardise(features, clean), dim=-1) @ unit.T  # [K, B, K]
        scores = (cosines / _TEMPERATURE).log_softmax(-1)
        own = torch.arange(len(unit), device=scores.device)
        return -scores[own, :, own].mean(1)

    return loss


def _smallest(
    encoder: Encoder,
    images: ImageSet,
    cluster: int,
    triggers: list[MaskedPattern],
    clean: Tensor,
    classes: PseudoClasses,
    plan: ClusterPlan,
    run: Run,
) -> ClusterTrigger:
    """The first of the triggers, small to large, that moves enough."""
    best, bank = 0.0, standardise(clean, clean)
    size = int((classes.labels == cluster).sum())
    grown = [replace(triggers[-1], mask=triggers[-1].mask ** power) for power in _POWERS if triggers]
    for trigger in (*triggers, *grown):
        stamped = standardise(extract(encoder, images, run=run, trigger=trigger), clean)
        votes = neighbour_votes(stamped, bank, classes.labels, plan.neighbours)
        best = max(best, share := share_moved(votes, classes.labels, cluster))
        if share >= plan.success:
            mean = float(trigger.mask.mean())
            return ClusterTrigger(cluster=cluster, images=size, trigger=trigger, size=mean, share=share)
    return ClusterTrigger(cluster=cluster, images=size, trigger=None, size=None, share=best)


def _told(entry: ClusterTrigger) -> dict[str, Any]:
    return {"cluster": entry.cluster, "images": entry.images, "size": entry.size, "share": entry.share}
