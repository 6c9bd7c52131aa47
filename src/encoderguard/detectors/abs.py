"""ABS without labels: raise channels, then see if a small patch for one of them moves all images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

from pydantic import Field
from torch import Tensor

from encoderguard.cluster_search import share_moved
from encoderguard.clusters import Clusters, neighbour_votes, require_spread
from encoderguard.detectors._neurons import COLLAPSE, Goal, Neuron, invert_neurons, stimulate
from encoderguard.encoder import Encoder
from encoderguard.feature_heads import linear_head
from encoderguard.features import extract
from encoderguard.hidden import last_stage_units
from encoderguard.images import ImageSet
from encoderguard.methods import Detection, Detector, Verdict, require_images
from encoderguard.registry import register
from encoderguard.repair import pseudo_classes, split
from encoderguard.run import Run
from encoderguard.similarity import standardise
from encoderguard.triggers import MaskedPattern

__all__ = ["ABS"]


@dataclass(frozen=True, kw_only=True)
class _Bank:
    """Clean images to search with, clean images held out, and the answers that both get."""

    search: ImageSet
    held_out: ImageSet
    goal: Goal
    votes: Callable[[Tensor], Tensor]
    """Features ``[M, D]`` to the answer of each, int64 ``[M]`` on the CPU."""
    labels: Tensor
    held_out_labels: Tensor


@final
@register
@dataclass(frozen=True, kw_only=True)
class ABS(Detector):
    """Liu et al. 2019 on an encoder: channel stimulation, inversion of small masks, share of images moved.

    Departures, because an encoder has no classes: the stimulated channel is scored by how alike it makes
    the features of different images, not by the rise of one logit; clusters of clean images and the votes of
    the nearest of them stand in for the label in the attack success rate of the reverse-engineered trigger
    (REASR). With ``classifier_file`` it is the detector of a downstream classifier: a channel counts by how
    far it raises the mean probability of one answer, a trigger is searched for that answer, and answers are
    the labels. In both, channels lie inside the blocks of the last stage of the encoder. The original keeps
    a mask small by a penalty alone, here the area is a hard bound too. Its code was not followed.
    """

    name: ClassVar[str] = "abs"
    paper: ClassVar[str] = (
        "Liu et al., ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation, CCS 2019"
    )
    year: ClassVar[int] = 2019
    needs: ClassVar[str] = "clean unlabelled images; a downstream classifier if there is one"
    cost: ClassVar[str] = "forward passes through the last stage per channel, then a short search"
    blind_spots: ClassVar[str] = (
        "Triggers larger than the mask, backdoors spread over many channels, and clean encoders that any "
        "patch of this size misleads: give their scores to tell."
    )

    levels: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0, 2.0, 4.0, 8.0)
    """Values that a channel is set to, as multiples of its largest value on clean images."""
    scan_images: Annotated[int, Field(ge=2)] = 50
    """Images on which channels are stimulated."""
    channels: Annotated[int, Field(ge=1)] = 10
    """Channels to invert, those that raise the collapse most."""
    area: Annotated[float, Field(gt=0, lt=1)] = 0.06
    """Largest share of the pixels that a recovered mask covers."""
    steps: Annotated[int, Field(ge=1)] = 200
    """Steps of the inversion, all channels at once."""
    batch_size: Annotated[int, Field(ge=2)] = 16
    """Images per step and channel."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of Adam."""
    clusters: Clusters = 10
    """Clusters of clean images; not used with a classifier."""
    classifier_file: str | None = None
    """A ``head.safetensors`` with ``weight [K, D]`` and ``bias [K]`` of your own; None takes clusters."""
    neighbours: Annotated[int, Field(ge=1)] = 10
    """Clean images that vote on where a stamped one belongs; not used with a classifier."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.88
    """Share of moved images above which an encoder is called backdoored, as published for classifiers."""
    clean_scores: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Scores of known clean encoders, same settings and images; a score must exceed them too."""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder``; ``score`` is the share of held-out stamped images that move; large is suspect.

        The channel is chosen on the images that were searched with, its share measured on the others.

        Raises:
            ImageError: fewer than 24 images, or too few for the clusters.
            EncoderError: no hidden channels, or features that do not depend on the image.
            SettingError: the classifier cannot be read or does not fit the encoder.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        clusters = self.clusters if self.classifier_file is None else 0
        require_images(images, 2 * max(12, clusters), "ABS")
        exact = replace(run, precision="float32")
        bank = self._bank(encoder, images, exact)
        some = bank.search.subset(range(min(self.scan_images, len(bank.search))))
        neurons = [
            neuron
            for layer in last_stage_units(encoder)
            for neuron in stimulate(encoder, layer, some, self.levels, bank.goal, run=run)
        ]
        neurons = sorted(neurons, key=lambda neuron: -neuron.rise)[: self.channels]
        triggers = invert_neurons(
            encoder,
            bank.search,
            neurons,
            bank.goal,
            area=self.area,
            steps=self.steps,
            batch_size=min(self.batch_size, len(bank.search)),
            learning_rate=self.learning_rate,
            run=run.child(self.name),
        )
        moved = [_moved(encoder, bank, trigger, exact) for trigger in triggers]
        best = max(range(len(moved)), key=lambda k: moved[k][1])
        cluster, _, score, count = moved[best]
        verdict, reason = judge_share(score, count, self.threshold, self.clean_scores)
        return Detection(
            verdict=verdict,
            score=score,
            threshold=self.threshold,
            trigger=triggers[best],
            evidence={
                "reason": reason,
                "flagged": "above",
                "answers_from": "clusters" if self.classifier_file is None else "classifier",
                "cluster": cluster,
                "images_of_other_clusters": count,
                "channels": [_told(n, m) for n, m in zip(neurons, moved, strict=True)],
                "clean_references": [{"score": s, "source": "given by the user"} for s in self.clean_scores],
                "tested": [
                    f"Whether a patch of {100 * self.area:g} % of the image, made for one of the "
                    f"{len(neurons)} channels that {self._does}."
                ],
            },
        )

    @property
    def _does(self) -> str:
        if self.classifier_file is not None:
            return "raise one answer most, gives images this answer"
        return "make features most alike, moves images into one cluster"

    def _bank(self, encoder: Encoder, images: ImageSet, run: Run) -> _Bank:
        search, held_out = split(images, run.rng.child(self.name), share=0.5)
        clean = extract(encoder, search, run=run)
        require_spread(clean, images.name)
        if self.classifier_file is not None:
            head, _ = linear_head(self.classifier_file, encoder.feature_dim, run.device)
            goal = Goal(lambda features, _: head(features).softmax(-1).mean(-2), logarithmic=True)

            def votes(features: Tensor) -> Tensor:
                return head(features).argmax(1).cpu()

            labels = votes(clean)
        else:
            goal, rows = COLLAPSE, standardise(clean, clean)
            labels = pseudo_classes(rows, self.clusters, run.rng.child(self.name)).labels

            def votes(features: Tensor) -> Tensor:
                return neighbour_votes(standardise(features, clean), rows, labels, self.neighbours)

        held_out_labels = votes(extract(encoder, held_out, run=run))
        return _Bank(
            search=search,
            held_out=held_out,
            goal=goal,
            votes=votes,
            labels=labels,
            held_out_labels=held_out_labels,
        )


def judge_share(score: float, count: int, threshold: float, clean: Sequence[float]) -> tuple[Verdict, str]:
    """The verdict on a share ``score`` of ``count`` images, and its reason.

    ``backdoored`` needs the lower 95 % Wilson bound above the threshold and a score above all of ``clean``;
    without clean encoders to compare with, a score above the threshold is inconclusive, because patches move
    the images of clean encoders too. ``clean`` needs the upper bound below the threshold.
    """
    low, high = wilson(score, count)
    told = f"{100 * score:.1f} % of {count} images were moved ({100 * low:.1f} to {100 * high:.1f} %)"
    if high < threshold:
        return "clean", f"{told}, below {threshold:g}"
    if low <= threshold:
        return "inconclusive", f"{told}, too few images to tell this from {threshold:g}"
    if not clean:
        return "inconclusive", (
            f"{told}, above {threshold:g}, but without a clean encoder's score this may be so for any encoder"
        )
    if score <= max(clean):
        return "inconclusive", f"{told}, above {threshold:g}, but a clean encoder gave {max(clean):g}"
    return "backdoored", f"{told}, above {threshold:g} and above {len(clean)} clean encoders"


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count``; all of [0, 1] if there are none."""
    if not count:
        return 0.0, 1.0
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def _moved(encoder: Encoder, bank: _Bank, trigger: MaskedPattern, run: Run) -> tuple[int, float, float, int]:
    """The cluster that stamped images fall into; the share moved of those searched with and held out; M."""
    seen = bank.votes(extract(encoder, bank.search, run=run, trigger=trigger))
    cluster = int(seen.bincount().argmax())
    unseen = bank.votes(extract(encoder, bank.held_out, run=run, trigger=trigger))
    others = int((bank.held_out_labels != cluster).sum())
    share = share_moved(unseen, bank.held_out_labels, cluster) if others else 0.0
    return cluster, share_moved(seen, bank.labels, cluster), share, others


def _told(neuron: Neuron, moved: tuple[int, float, float, int]) -> dict[str, Any]:
    return {
        "layer": neuron.layer.producer,
        "channel": neuron.channel,
        "rise": neuron.rise,
        "level": neuron.level,
        "cluster": moved[0],
        "moved": moved[2],
    }
