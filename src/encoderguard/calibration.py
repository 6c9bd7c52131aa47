"""What DECREE's score is on known clean encoders, and when a margin carries a verdict. Label-free.

The paper's fixed threshold, .1, is close to what clean encoders reach (ResNet-18 on CIFAR-10: .09-.13) or far
above it (on digits: .01-.06), so a score is judged against clean references wherever there are any. With m
references the smallest rank p-value is 1 / (m + 1): a few cannot give significance, only a ratio. So a ratio
decides, and the p-value is reported beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from encoderguard.encoder import EncoderSpec
from encoderguard.methods import Verdict

__all__ = ["CLEAN_SCORES", "CleanScore", "FeatureSpace", "Judgement", "judge", "known_clean", "rank_p_value"]

FeatureSpace = Literal["raw", "standardised"]
_CLOSE = 1.1
"""A score from ``min(clean) / 1.1`` on counts as inside the clean encoders' own variation."""
_ALONE = 5.0
"""Without any clean reference a score must undercut tau by this factor: some clean encoders score .02."""


@dataclass(frozen=True, kw_only=True)
class CleanScore:
    """DECREE's score (mean of the mask, in [0, 1]) of one clean encoder, and its origin."""

    architecture: str
    width: int
    stem: str
    image_size: int
    """Side of the images in pixels."""
    score: float
    images: str
    source: str
    feature_space: FeatureSpace = "raw"


def _resnet18(
    width: int, images: str, source: str, *scores: float, space: FeatureSpace = "raw"
) -> tuple[CleanScore, ...]:
    return tuple(
        CleanScore(
            architecture="encoderguard:resnet18",
            width=width,
            stem="cifar",
            image_size=32,
            score=score,
            images=images,
            source=source,
            feature_space=space,
        )
        for score in scores
    )


_LOG = "third-party log of the authors' code"
_TRIAL = "trial of the authors' schedule with other code"
_OWN = "digits recipe, seeds 100 on: the fast schedule on 300 images"
_CIFAR = "cifar10 recipe, 20 epochs: the fast schedule on 1,000 images"
_ZOO = "zoo small, seeds 0 to 2, 10 epochs: the fast schedule on 300 images"
CLEAN_SCORES: tuple[CleanScore, ...] = (
    *_resnet18(64, "cifar10", _LOG, 0.125, 0.127),
    *_resnet18(64, "stl10", _LOG, 0.112),
    *_resnet18(16, "cifar10", _CIFAR, 0.142),
    *_resnet18(16, "cifar10", _ZOO, 0.263, 0.221, 0.201),
    *_resnet18(8, "digits", _TRIAL, 0.097),
    *_resnet18(8, "digits", _OWN, 0.0543, 0.0281, 0.0381, 0.0543, 0.0143, 0.0591),
)


def known_clean(
    spec: EncoderSpec, image_size: int, feature_space: FeatureSpace, images: str
) -> list[CleanScore]:
    """The entries for this architecture, width, stem, image side in pixels, feature space and image set.

    A score belongs to its images, on others the same clean encoder can score a fraction of it: the name
    ``images`` must contain that of the entry.
    """
    key = (spec.architecture, spec.width, spec.stem, image_size, feature_space)
    alike = [e for e in CLEAN_SCORES if e.images in images.casefold()]
    return [e for e in alike if (e.architecture, e.width, e.stem, e.image_size, e.feature_space) == key]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict and its bounds: ``backdoored`` below ``threshold``, ``clean`` from ``clean_from`` on."""

    verdict: Verdict
    threshold: float
    clean_from: float
    reason: str


def judge(
    score: float, *, tau: float, margin: float, own: Sequence[float] = (), table: Sequence[float] = ()
) -> Judgement:
    """Judge a score for which small means suspicious; between the two bounds it is inconclusive.

    ===================  ==============================  ============================
    references           backdoored below                clean from
    ===================  ==============================  ============================
    own clean encoders   min(own) / margin               min(own)
    published ones       min(tau, min(table) / margin)   max(tau, min(table) / 1.1)
    none                 tau / 5                         tau * margin
    ===================  ==============================  ============================

    Own references, measured with the same settings and images, replace tau; published ones, made under other
    conditions, only tighten it.

    Args:
        score: in [0, 1].
        tau: the paper's fixed threshold.
        margin: by which factor a score must undercut the smallest clean reference; at least 1.
        own: scores of clean encoders that the user measured.
        table: scores of clean encoders of this architecture, from ``known_clean``.
    """
    if own:
        low, high = min(own) / margin, min(own)
        basis = f"{len(own)} own clean encoders from {min(own):.3f} to {max(own):.3f}"
    elif table:
        low, high = min(tau, min(table) / margin), max(tau, min(table) / _CLOSE)
        basis = f"tau {tau:g} and {len(table)} known clean encoders from {min(table):.3f} to {max(table):.3f}"
    else:
        low, high = tau / max(_ALONE, margin), tau * margin
        basis = f"tau {tau:g} alone: no clean encoder of this architecture is known on such images"
    verdict: Verdict = "backdoored" if score < low else "clean" if score >= high else "inconclusive"
    place = {"backdoored": f"below {low:.3f}", "clean": f"not below {high:.3f}"}.get(
        verdict, f"between {low:.3f} and {high:.3f}"
    )
    reason = f"score {score:.4f} is {place} ({basis})"
    return Judgement(verdict=verdict, threshold=low, clean_from=high, reason=reason)


def rank_p_value(score: float, references: Sequence[float]) -> float | None:
    """``(1 + #{references <= score}) / (m + 1)``: how often clean encoders score this low; None if m = 0."""
    if not references:
        return None
    return (1 + sum(reference <= score for reference in references)) / (len(references) + 1)
