"""DECREE: an encoder is suspect if a small trigger makes all images look alike to it."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from encoderguard.calibration import CleanScore, FeatureSpace, Judgement, judge, known_clean, rank_p_value
from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.inversion import Candidate, Inversion, Objective, SearchPlan, invert
from encoderguard.methods import Detection, Detector, require_images
from encoderguard.penalty import LambdaRule
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine, standardise
from encoderguard.triggers import MaskedPattern

__all__ = ["Decree"]

_ENOUGH = 100
"""A verdict without own references needs so many: the fewer there are, the smaller is a mask for them all."""
_LARGE = 64
"""Sides above this use the authors' long schedule (theirs is 224 px)."""
_ROUND = 8
"""Steps between two looks at the fast schedule's stop rule: as 1,000 images in batches of 128 make. Its other
lengths are multiples; on encoders of digits and of CIFAR-10 at width 16 longer searches gave little more."""
_POWERS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the mask, tried one after another if no candidate holds on all images."""
_FEW = 256
"""A candidate that fails on about so many images is not tried on all: the next one is little larger."""


@final
@register
@dataclass(frozen=True, kw_only=True)
class Decree(Detector):
    """Feng et al. 2023, Section 4.2, with the mask polarity of the authors' code (1 replaces the pixel).

    Minimises ``-mean cos(E(x'_p), E(x'_q)) + lambda |m|_1`` over pairs p != q. The score, PL1, is the mean of
    the smallest mask that exceeds ``beta`` on a batch of the search and in float32 on all images.
    """

    name: ClassVar[str] = "decree"
    paper: ClassVar[str] = (
        "Feng et al., Detecting Backdoors in Pre-trained Encoders, CVPR 2023, arXiv:2303.15180"
    )
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a search: forward and backward passes through the frozen encoder"
    blind_spots: ClassVar[str] = (
        "Triggers that cover the image or differ from image to image, and backdoors that do not draw all "
        "images together."
    )

    tau: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Threshold on the PL1 norm (Eq. 7)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Mean cosine of stamped images above which a trigger counts (Eq. 5)."""
    restarts: Annotated[int, Field(ge=1)] = 3
    """Random starts; the smallest verified mask decides."""
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Images per step, at most all; None takes 16, then 32 in the ``fast`` schedule, 128 in the authors'."""
    schedule: Literal["fast", "authors"] = "fast"
    """``authors``: every restart runs to their stop rule, looked at once per pass over the images.
    ``fast``: smaller batches that must do a little better, a quicker lambda, a stop rule every 8 steps; from
    step 24 on the worse half of the restarts is dropped until one is left."""
    max_epochs: Annotated[int, Field(ge=1)] = 1000
    """Passes over the images at most."""
    max_steps: Annotated[int, Field(ge=1)] = 3000
    """Steps at most; the best so far is used."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Time budget of the search; the best so far is used. The result then depends on the machine."""
    feature_space: FeatureSpace = "raw"
    """Where cosines are taken: ``raw`` as published, or with features standardised over the clean images."""
    calibrated: bool = True
    """Judge against clean references too, "inconclusive" where they do not decide; else score < tau alone."""
    margin: Annotated[float, Field(ge=1)] = 1.5
    """Factor by which a score must undercut the smallest clean reference to be called backdoored."""
    clean_scores: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Scores of known clean encoders, same settings and images; they replace tau and the built-in scores."""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder`` from clean unlabelled images; ``score`` is PL1, small if a backdoor is indicated.

        Without any verified trigger the score is 1.0 (a full mask always collapses all features).

        Raises:
            ImageError: fewer than two images.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        require_images(images, 2, "DECREE")
        standardised = self.feature_space == "standardised"
        exact = replace(run, precision="float32")
        clean = extract(encoder, images if standardised else _some(images), run=exact).to(run.device)
        cosine = _Cosine(clean if standardised else None)
        found = invert(encoder, images, _negative(cosine), self._plan(images), run=run.child("decree"))
        best, measured = self._verify(encoder, images, cosine, found, run)
        score = best.size if best is not None else 1.0
        known = known_clean(encoder.spec, max(images.shape), self.feature_space, images.name)
        judgement = self._judge(score, known, best is not None, len(images))
        references = self.clean_scores or tuple(entry.score for entry in known)
        return Detection(
            verdict=judgement.verdict,
            score=score,
            threshold=judgement.threshold,
            trigger=best.trigger if best is not None else None,
            p_value=rank_p_value(score, references),
            evidence={
                "reason": judgement.reason,
                "tau": self.tau,
                "clean_from": judgement.clean_from,
                "clean_references": self._references(known),
                "ratio_to_smallest_clean": score / min(references) if references else None,
                "flagged": "below",
                "feature_space": self.feature_space,
                "cosine_of_clean_images": float(cosine(clean)),
                **measured,
                **_search_evidence(found),
            },
        )

    def _references(self, known: list[CleanScore]) -> list[dict[str, Any]]:
        if self.clean_scores:
            return [{"score": score, "source": "given by the user"} for score in self.clean_scores]
        return [{"score": entry.score, "images": entry.images, "source": entry.source} for entry in known]

    def _plan(self, images: ImageSet) -> SearchPlan:
        """The authors' schedule, in steps."""
        large = max(images.shape) > _LARGE
        size = self.batch_size or 128
        epoch = max(1, len(images) // size)
        drops = (200, 500) if large else (30, 50)
        authors = SearchPlan(
            goal=-self.beta,
            restarts=self.restarts,
            batch_sizes=((0, size),),
            max_steps=min(self.max_epochs * epoch, self.max_steps),
            seconds=self.seconds,
            learning_rates=((0, 0.5), (drops[0] * epoch, 0.1), (drops[1] * epoch, 0.05)),
            penalty=LambdaRule(lowest=1e-7 if large else 1e-5),
            stale_steps=35 if large else 10,
        )
        return (
            authors if self.schedule == "authors" else self._shortened(authors, _ROUND * (2 if large else 1))
        )

    def _shortened(self, authors: SearchPlan, look: int) -> SearchPlan:
        """The same search with a look at who is ahead every ``look`` steps.

        The best of many small batches flatters a candidate; a fifth of the way to 1 makes up for it.
        """
        halvings = math.ceil(math.log2(self.restarts))
        sizes = ((0, 16), (3 * look, 32)) if self.batch_size is None else authors.batch_sizes
        return replace(
            authors,
            goal=-(self.beta + 0.2 * (1 - self.beta)),
            batch_sizes=sizes,
            penalty=replace(authors.penalty, patience=3),
            round_steps=look,
            rungs=tuple((3 + k) * look for k in range(halvings)),
            stale_steps=2 * look,
            least_gain=0.01,
        )

    def _verify(
        self, encoder: Encoder, images: ImageSet, cosine: "_Cosine", found: Inversion[MaskedPattern], run: Run
    ) -> tuple[Candidate[MaskedPattern] | None, dict[str, Any]]:
        """The smallest candidate that holds in float32 on all images, and what was measured on the way."""
        queue = sorted((c for kept in found.candidates for c in kept), key=lambda c: c.size)
        queue += [_grown(queue[0], power) for power in _POWERS if queue]
        looks = ((_some(images), run), (images, replace(run, precision="float32")))
        for tried, candidate in enumerate(queue, start=1):
            for part, how in looks:
                features = extract(encoder, part, run=how, trigger=candidate.trigger).to(run.device)
                value = float(cosine(features))
                if value <= self.beta:
                    break
            else:
                return candidate, {"cosine_of_stamped_images": value, "candidates_tried": tried}
        return None, {"cosine_of_stamped_images": None, "candidates_tried": len(queue)}

    def _judge(self, score: float, known: list[CleanScore], succeeded: bool, count: int) -> Judgement:
        if not self.calibrated:
            verdict: Literal["backdoored", "clean"] = "backdoored" if score < self.tau else "clean"
            reason = f"score {score:.4f} against tau {self.tau:g}, as published"
            return Judgement(verdict=verdict, threshold=self.tau, clean_from=self.tau, reason=reason)
        table = [entry.score for entry in known]
        judgement = judge(score, tau=self.tau, margin=self.margin, own=self.clean_scores, table=table)
        if succeeded and (count >= _ENOUGH or self.clean_scores):
            return judgement
        if succeeded:
            reason = f"{count} images are too few, give {_ENOUGH} at least: a mask that suits few is small"
            return replace(judgement, verdict="inconclusive", reason=f"score {score:.4f}, but {reason}")
        reason = f"no restart found a trigger with mean cosine above {self.beta:g} on all images"
        return replace(judgement, verdict="inconclusive", reason=reason)


def _grown(candidate: Candidate[MaskedPattern], power: float) -> Candidate[MaskedPattern]:
    """The same trigger with a fuller mask: what a search stopped too early falls back to."""
    mask = candidate.trigger.mask**power
    return replace(candidate, size=float(mask.mean()), trigger=replace(candidate.trigger, mask=mask))


def _some(images: ImageSet) -> ImageSet:
    """Evenly spaced images, about ``_FEW``: a first look and a baseline do not need all."""
    return images.subset(range(0, len(images), max(1, len(images) // _FEW)))


@dataclass(frozen=True, eq=False)
class _Cosine:
    """Mean cosine of different rows of ``[..., N, D]``, standardised over ``reference`` if there is one."""

    reference: Tensor | None

    def __call__(self, features: Tensor) -> Tensor:
        if self.reference is not None:
            features = standardise(features, self.reference)
        return mean_pairwise_cosine(features)


def _negative(cosine: _Cosine) -> Objective:
    def loss(features: Tensor) -> Tensor:
        return -cosine(features)

    return loss


def _search_evidence(found: Inversion[MaskedPattern]) -> dict[str, Any]:
    return {
        "restarts": [
            {
                "smallest_mask_on_a_batch": kept[0].size if kept else None,
                "steps": steps,
                "outcome": outcome,
            }
            for kept, steps, outcome in zip(found.candidates, found.steps, found.outcomes, strict=True)
        ],
        "image_passes": found.image_passes,
        "batchnorm_folded": found.folded,
        "curves": {
            name: [round(v, 6) for v in values if math.isfinite(v)] for name, values in found.history.items()
        },
    }
