"""Neural Cleanse (Wang et al. 2019): one answer is reached by a far smaller trigger than the others."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field

from encoderguard.clusters import Clusters, outlier_indices
from encoderguard.encoder import Encoder
from encoderguard.feature_heads import Head, cluster_head, linear_head
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Detection, Detector, Verdict, require_images
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.smallest import AnswerPlan, Smallest, smallest_per_answer

__all__ = ["NeuralCleanse", "anomaly_index"]

_FEWEST_SIZES = 8
"""With fewer sizes an anomaly index says nothing: of three values the middle one is the median (ours)."""


def anomaly_index(sizes: list[float]) -> float:
    """``(median - min) / (1.4826 MAD)`` of the masks' sizes; 0 with fewer than two."""
    if len(sizes) < 2:
        return 0.0
    return float(outlier_indices(torch.tensor(sizes)).max().clamp_min(0))


@register
@final
@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Detector):
    """The smallest trigger towards each answer, then the outlier among the sizes of their masks.

    Departs from the paper where an encoder has no classes: clusters of clean images stand for them, with the
    nearest centroid as the head. With ``classifier_file`` it is the paper's detector on a downstream
    classifier, as in DECREE's Table 1. From the authors' code: all answers are searched in one batch with
    one number of steps, and the weight of the mask moves by one factor up and down. Fewer than eight sizes
    carry no verdict.
    """

    name: ClassVar[str] = "neural_cleanse"
    paper: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    year: ClassVar[int] = 2019
    needs: ClassVar[str] = "clean unlabelled images; a downstream classifier if there is one"
    cost: ClassVar[str] = "a search per answer: forward and backward passes through the frozen encoder"
    blind_spots: ClassVar[str] = (
        "Triggers that cover the image, several backdoors at once (they raise each other's median), fewer "
        "than eight answers, and a target that is none of the clusters or classes."
    )

    clusters: Clusters = 10
    """Clusters of clean images; not used with a classifier."""
    classifier_file: str | None = None
    """A ``head.safetensors`` with ``weight [K, D]`` and ``bias [K]`` of your own; None takes clusters."""
    threshold: Annotated[float, Field(gt=0)] = 2.0
    """Anomaly index above which the verdict is `backdoored`."""
    success: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of all images that must get the answer for a mask to count."""
    steps: Annotated[int, Field(ge=1)] = 500
    """Steps of the search, all answers at once."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Images per step and answer."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of Adam."""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder`` from clean unlabelled images; ``score`` is the anomaly index, large if suspect.

        It is 0 if fewer than two answers were reached.

        Raises:
            ImageError: fewer images than clusters, or fewer than two.
            EncoderError: the features do not depend on the image.
            SettingError: the classifier cannot be read or does not fit the encoder.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        require_images(images, 2, "Neural Cleanse")
        head, count = self._head(encoder, images, run)
        clean = extract(encoder, images, run=replace(run, precision="float32"))
        answers = torch.bincount(head(clean).argmax(1).cpu(), minlength=count).tolist()
        plan = AnswerPlan(
            success=self.success,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )
        found = smallest_per_answer(encoder, images, head, range(count), plan, run=run.child("inversion"))
        sizes = [entry.size for entry in found if entry.size is not None]
        score = anomaly_index(sizes)
        verdict, reason = self._judge(score, len(sizes), count)
        worst = min((k for k in range(count) if found[k].size is not None), key=_size(found), default=None)
        return Detection(
            verdict=verdict,
            score=score,
            threshold=self.threshold,
            trigger=None if worst is None else found[worst].trigger,
            evidence={
                "reason": reason,
                "flagged": "above",
                "answers_from": "clusters" if self.classifier_file is None else "classifier",
                "answer": worst,
                "found": [
                    {"answer": k, "images": answers[k], "size": entry.size, "share": entry.value}
                    for k, entry in enumerate(found)
                ],
                "tested": [
                    f"Whether one of {count} answers is reached by a far smaller trigger than the others."
                ],
            },
        )

    def _head(self, encoder: Encoder, images: ImageSet, run: Run) -> tuple[Head, int]:
        if self.classifier_file is not None:
            return linear_head(self.classifier_file, encoder.feature_dim, run.device)
        head, _ = cluster_head(encoder, images, self.clusters, run=run)
        return head, self.clusters

    def _judge(self, score: float, reached: int, count: int) -> tuple[Verdict, str]:
        if reached < _FEWEST_SIZES:
            return "inconclusive", (
                f"a trigger was found for {reached} of {count} answers, "
                f"and an outlier among fewer than {_FEWEST_SIZES} sizes says nothing"
            )
        verdict: Verdict = "backdoored" if score > self.threshold else "clean"
        place = "above" if verdict == "backdoored" else "not above"
        return verdict, f"the smallest of {reached} masks has index {score:.2f}, {place} {self.threshold:g}"


def _size(found: list[Smallest]) -> Any:
    return lambda k: found[k].size
