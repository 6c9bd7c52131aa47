"""What DECREE's score is on known clean encoders, and when a margin carries a verdict. Label-free.

The paper's fixed threshold is close to what clean encoders reach (ResNet-18 at 32 px: .11-.13 against .1), so a score
is judged against both. With m clean references the smallest rank p-value is 1 / (m + 1); few references cannot give
significance, only a ratio, which is why a ratio decides and the p-value is reported beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from encoderguard.encoder import EncoderSpec
from encoderguard.methods import Verdict

__all__ = ["CLEAN_SCORES", "CleanScore", "FeatureSpace", "Judgement", "judge", "known_clean", "rank_p_value"]

FeatureSpace = Literal["raw", "standardised"]
_CLOSE = 1.1
"""A score at least ``min(clean) / 1.1`` counts as inside the clean encoders' own variation."""


@dataclass(frozen=True, kw_only=True)
class CleanScore:
    """DECREE's PL1 norm (mean of the mask, in [0, 1]) of one clean encoder, and where the number comes from."""

    architecture: str
    width: int
    stem: str
    image_size: int
    score: float
    images: str
    source: str
    feature_space: FeatureSpace = "raw"


def _resnet18(width: int, score: float, images: str, source: str) -> CleanScore:
    return CleanScore(
        architecture="encoderguard:resnet18",
        width=width,
        stem="cifar",
        image_size=32,
        score=score,
        images=images,
        source=source,
    )


_LOG = "third-party log of the authors' code"
_TRIAL = "own trial"
CLEAN_SCORES: tuple[CleanScore, ...] = (
    _resnet18(64, 0.125, "cifar10", _LOG),
    _resnet18(64, 0.127, "cifar10", _LOG),
    _resnet18(64, 0.112, "stl10", _LOG),
    _resnet18(16, 0.088, "cifar10", _TRIAL),
    _resnet18(16, 0.090, "cifar10", _TRIAL),
    _resnet18(8, 0.097, "digits", _TRIAL),
)


def known_clean(spec: EncoderSpec, image_size: int, feature_space: FeatureSpace) -> list[CleanScore]:
    """The table's entries for this architecture, width, stem, image side in pixels and feature space."""
    key = (spec.architecture, spec.width, spec.stem, image_size, feature_space)
    return [
        entry
        for entry in CLEAN_SCORES
        if (entry.architecture, entry.width, entry.stem, entry.image_size, entry.feature_space) == key
    ]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with the bounds that gave it: ``backdoored`` below ``threshold``, ``clean`` from ``clean_from`` on."""

    verdict: Verdict
    threshold: float
    clean_from: float
    reason: str


def judge(
    score: float, *, tau: float, margin: float, own: Sequence[float] = (), table: Sequence[float] = ()
) -> Judgement:
    """Judge a score for which small means suspicious; scores between the two bounds are inconclusive.

    ===================  ==============================  ============================
    references           backdoored below                clean from
    ===================  ==============================  ============================
    own clean encoders   min(own) / margin               min(own)
    published ones       min(tau, min(table) / margin)   max(tau, min(table) / 1.1)
    none                 tau / margin                    tau * margin
    ===================  ==============================  ============================

    Own references, measured with the same settings and images, replace tau; published ones only tighten it.

    Args:
        score: in [0, 1].
        tau: the paper's fixed threshold.
        margin: by which factor a score must undercut the clean references (or tau); at least 1.
        own: scores of clean encoders that the user measured.
        table: scores of clean encoders of this architecture from ``known_clean``.
    """
    if own:
        low, high = min(own) / margin, min(own)
        basis = f"{len(own)} own clean encoders from {min(own):.3f} to {max(own):.3f}"
    elif table:
        low, high = min(tau, min(table) / margin), max(tau, min(table) / _CLOSE)
        basis = f"tau {tau:g} and {len(table)} known clean encoders from {min(table):.3f} to {max(table):.3f}"
    else:
        low, high = tau / margin, tau * margin
        basis = f"tau {tau:g} alone; no clean encoder of this architecture is known"
    verdict: Verdict = "backdoored" if score < low else "clean" if score >= high else "inconclusive"
    place = {"backdoored": "below", "clean": "above", "inconclusive": "between"}[verdict]
    bounds = f"{low:.3f} and {high:.3f}" if verdict == "inconclusive" else f"{low if verdict == 'backdoored' else high:.3f}"
    return Judgement(
        verdict=verdict,
        threshold=low,
        clean_from=high,
        reason=f"score {score:.4f} is {place} {bounds} ({basis})",
    )


def rank_p_value(score: float, references: Sequence[float]) -> float | None:
    """``(1 + #{references <= score}) / (m + 1)``: how often a clean encoder scores this low; None without any."""
    if not references:
        return None
    return (1 + sum(reference <= score for reference in references)) / (len(references) + 1)
