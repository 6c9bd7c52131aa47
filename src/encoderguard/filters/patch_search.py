"""PatchSearch: find the patch that moves other images into its cluster, then every image that holds it."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoderguard.clusters import Clusters, nearest_centroids, require_spread
from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.filters._patch_classifier import fit_and_score
from encoderguard.filters._patches import Features, net_flips, paste, telling_window
from encoderguard.images import ImageSet
from encoderguard.methods import Filter, Ranking, require_images
from encoderguard.registry import register
from encoderguard.repair import PseudoClasses, pseudo_classes
from encoderguard.run import Run
from encoderguard.similarity import standardise

__all__ = ["PatchSearch", "best_patches", "live_after", "near_centroids", "prior_of"]

_TOP = 100
"""Indices that the evidence lists."""


@dataclass
class _Search:
    """The state of the search: who was looked at, with what result."""

    live: list[int]
    """Clusters that are still looked into."""
    waiting: dict[int, list[int]]
    """Images of each cluster that were not looked at, in random order."""
    flips: dict[int, int] = field(default_factory=dict)
    """Net flips of the patch of each image that was looked at."""
    patches: dict[int, Tensor] = field(default_factory=dict)
    rounds: int = 0
    pasted_on: int = 0

    def best_of(self, labels: Tensor) -> dict[int, int]:
        """The most flips of any image of each cluster that was looked into."""
        best: dict[int, int] = {}
        for index, flips in self.flips.items():
            cluster = int(labels[index])
            best[cluster] = max(best.get(cluster, flips), flips)
        return best


@final
@register
@dataclass(frozen=True, kw_only=True)
class PatchSearch(Filter):
    """Tejankar et al. 2023: a patch of a poisoned image moves any image into the poison's cluster.

    Departures: the window is the one whose removal loosens an image most from its cluster (occlusion, which
    needs no class and works for any architecture), not the peak of Grad-CAM; features are standardised over
    the images; counts follow smaller sets, and a patch that moves less than half of what the best one moves
    is not learned; the ensemble's networks are small and share no pre-training. From the authors' code:
    nothing reads which images are poisoned from file names, and nothing is cached between two passes.
    Retraining on what is kept is left to the user.
    """

    name: ClassVar[str] = "patch_search"
    paper: ClassVar[str] = (
        "Tejankar et al., Defending Against Patch-based Backdoor Attacks on Self-Supervised Learning, "
        "CVPR 2023, arXiv:2304.01482"
    )
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "the training set and the encoder trained on it"
    cost: ClassVar[str] = "forward passes over pasted images, then a small classifier"
    blind_spots: ClassVar[str] = (
        "Triggers without a place (blends, waves in the colours), and encoders that were tampered with after "
        "training: their training set holds no poison."
    )

    clusters: Clusters = 100
    """Clusters of the training set; 1,000 for 127,000 images in the paper."""
    per_round: Annotated[int, Field(ge=1)] = 2
    """Images of each live cluster that are looked at in a round."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the live clusters that is dropped after a round: those whose best patch moved least."""
    window: Annotated[float, Field(gt=0, le=1)] = 0.27
    """Side of a patch as a share of the image's (60 of 224 pixels)."""
    paste_on: Annotated[int, Field(ge=1)] = 100
    """Images, those nearest to the centroids, that every patch is pasted on; 1,000 in the paper."""
    patches: Annotated[int, Field(ge=1)] = 20
    """Patches that the classifier learns at most: those that move at least half as many as the best."""
    models: Annotated[int, Field(ge=1)] = 5
    """Classifiers whose probabilities are averaged."""
    steps: Annotated[int, Field(ge=1)] = 400
    """Steps of each classifier; 2,000 in the paper."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per step, half of them with a patch."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    """Of Adam."""
    smallest: Annotated[float, Field(gt=0)] = 0.33
    """Smallest factor of a pasted patch's side while the classifier learns (20 of 60 pixels)."""
    largest: Annotated[float, Field(gt=0)] = 1.33
    """Largest factor (80 of 60 pixels)."""
    suspicious: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the images, the most suspicious ones of the search, that no classifier learns from."""

    def rank(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Ranking:
        """Score every image by the mean probability that it holds one of the best patches.

        Raises:
            ImageError: fewer images than clusters.
            EncoderError: the features do not depend on the image.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        require_images(images, self.clusters, f"PatchSearch with {self.clusters} clusters")
        run = run.child(self.name)
        features = extract(encoder, images, run=replace(run, precision="float32"))
        require_spread(features, images.name)
        classes = pseudo_classes(standardise(features, features), self.clusters, run.rng)
        found = self._search(encoder, images, features, classes, run)
        prior = prior_of(classes.labels, found.flips)
        safe = prior.argsort(stable=True)[: len(images) - int(self.suspicious * len(images))]
        best = best_patches(found.flips, self.patches)
        scores, losses = fit_and_score(
            images,
            safe,
            [found.patches[index] for index in best],
            models=self.models,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            scale=(min(self.smallest, self.largest), max(self.smallest, self.largest)),
            run=run,
        )
        top = scores.argsort(descending=True, stable=True)[:_TOP]
        return Ranking(scores=scores, evidence=self._told(found, best, classes, top) | {"losses": losses})

    def _search(
        self, encoder: Encoder, images: ImageSet, clean: Tensor, classes: PseudoClasses, run: Run
    ) -> _Search:
        features, centroids = _standardised(encoder, clean, run), classes.centroids.to(run.device)
        side = max(2, round(self.window * min(images.shape)))
        bases = near_centroids(standardise(clean, clean), classes.centroids, self.paste_on)
        pixels = images.take(bases).to(run.device).float() / 255
        before = nearest_centroids(features(pixels), centroids)
        waiting = _members(classes.labels, self.clusters, run)
        state = _Search(list(range(self.clusters)), waiting, pasted_on=len(bases))
        while state.live:
            for cluster in state.live:
                for _ in range(min(self.per_round, len(state.waiting[cluster]))):
                    run.check_stop()
                    index = state.waiting[cluster].pop(0)
                    image = images.take([index])[0].to(run.device).float() / 255
                    patch = telling_window(features, image, centroids[cluster], side)
                    pasted = paste(pixels, patch, run.rng.generator("paste", index))
                    state.flips[index] = net_flips(features, pasted, before, centroids, cluster)
                    state.patches[index] = patch.cpu().clone()
            state.live = live_after(state.live, state.best_of(classes.labels), self.drop)
            state.rounds += 1
            most = max(state.flips.values())
            done = self.clusters - len(state.live)
            run.progress("search patches", done, self.clusters, f"{most} of {len(bases)} moved")
        return state

    def _told(self, found: _Search, best: list[int], classes: PseudoClasses, top: Tensor) -> dict[str, Any]:
        return {
            "rounds": found.rounds,
            "images_looked_at": len(found.flips),
            "most_flips": found.flips[best[0]],
            "pasted_on": found.pasted_on,
            "best_patches": [
                {"index": k, "cluster": int(classes.labels[k]), "flips": found.flips[k]} for k in best
            ],
            "top": top.tolist(),
        }


def near_centroids(z: Tensor, centroids: Tensor, most: int) -> Tensor:
    """Images near the centroids ``[K, D]`` by cosine, as many of each: distinct int64, at most ``most``.

    Args:
        z: the images' features ``[N, D]``.
        centroids: if there are more than ``most``, the first ones count.
        most: at least 1.
    """
    some = centroids[:most]
    cosines = F.normalize(some, dim=1) @ F.normalize(z, dim=1).T
    nearest = cosines.topk(min(len(z), most // len(some)), dim=1).indices
    return torch.tensor(sorted(set(nearest.flatten().tolist())))


def best_patches(flips: dict[int, int], most: int) -> list[int]:
    """Indices of the images with the best patches, best first: half the flips of the best one at least."""
    order = sorted(flips, key=lambda index: (-flips[index], index))
    return [index for index in order[:most] if 2 * flips[index] >= flips[order[0]]] or order[:1]


def live_after(live: list[int], best: dict[int, int], drop: float) -> list[int]:
    """The clusters that stay: all but a share ``drop`` of them, at least one, with the fewest flips."""
    order = sorted(live, key=lambda cluster: (best.get(cluster, 0), -cluster))
    return sorted(order[max(1, round(drop * len(live))) :])


def prior_of(labels: Tensor, flips: dict[int, int]) -> Tensor:
    """How suspicious each image is after the search: its own flips, or the most of any image of its cluster.

    Args:
        labels: clusters, int64 ``[N]``.
        flips: net flips by index of the image that the patch is from.

    Returns:
        float32 ``[N]``; 0 where nothing of the cluster was looked at.
    """
    best = torch.zeros(int(labels.max()) + 1)
    for index, value in flips.items():
        best[labels[index]] = max(float(best[labels[index]]), float(value))
    prior = best[labels]
    for index, value in flips.items():
        prior[index] = float(value)
    return prior


def _members(labels: Tensor, count: int, run: Run) -> dict[int, list[int]]:
    order = run.rng.permutation(len(labels), "order")
    return {cluster: order[labels[order] == cluster].tolist() for cluster in range(count)}


def _standardised(encoder: Encoder, clean: Tensor, run: Run) -> Features:
    probe, reference = encoder.frozen().to(run.device), clean.to(run.device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with run.autocast():
            found = probe(images).float()
        return standardise(found, reference)

    return features
