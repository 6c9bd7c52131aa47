"""What a reader needs to judge a trigger search, as JSON values."""

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from encoderguard.detectors._trigger_found import FamilyResult, Found
from encoderguard.detectors._trigger_verdict import Judged, NullKind, Rule, score_of
from encoderguard.nulls import excesses, resolution
from encoderguard.rays import LEVELS, UNITS, TriggerFamily

__all__ = ["evidence_of"]

_NOT_TESTED = [
    "Triggers that differ from image to image, that a generator makes, or that are things in the scene.",
    "Patches with a side above a third of the image, and changes stronger than the levels listed.",
    "Backdoors that move the features without making them alike, or that several triggers must set off.",
    "Inputs unlike the given images; the downstream classifier and the code that loads the encoder.",
]


def evidence_of(
    found: Found, nulls: Mapping[str, Found], judged: Judged, kind: NullKind, *, rule: Rule
) -> dict[str, Any]:
    """Reason, p-values, one curve per family with the range of the null, what was and was not tested."""
    tried = {family: len(result.bank) for family, result in found.families.items()}
    return {
        "reason": judged.reason,
        "direction": "a larger score is more suspicious",
        "flagged": "above",
        "null": kind,
        "null_size": len(nulls),
        "rank_resolution": resolution(len(nulls)),
        "decided_by": judged.decided_by,
        "fpr": rule.fpr,
        "complete": found.complete and all(null.complete for null in nulls.values()),
        "families": {
            family: _family(family, result, nulls, judged) for family, result in found.families.items()
        },
        "standing_out": _standing_out(found, nulls),
        "candidates_above_clean": _above_clean(found, nulls),
        "clean_references": _left_out(nulls, rule),
        "images_passed": found.images_passed,
        "tested": [
            f"{family}: {count} candidates{_refined(found, family)}" for family, count in tried.items()
        ],
        "not_tested": _NOT_TESTED,
    }


def _refined(found: Found, family: TriggerFamily) -> str:
    refined = any(ray.label.startswith("refined") for ray in found.families[family].rays)
    levels = ", ".join(f"{level:g}" for level in LEVELS[family])
    return f"{' and gradient refinement' if refined else ''}, at {levels} ({UNITS[family]})."


def _family(
    family: TriggerFamily, result: FamilyResult, nulls: Mapping[str, Found], judged: Judged
) -> dict[str, Any]:
    others = [null.families[family] for null in nulls.values()]
    by_level = list(zip(*(other.curve for other in others), strict=True))
    return {
        "levels": list(LEVELS[family]),
        "unit": UNITS[family],
        "collapse": _rounded(result.curve),
        "null_low": _rounded([min(values) for values in by_level]),
        "null_high": _rounded([max(values) for values in by_level]),
        "statistic": round(result.statistic, 4),
        "null_statistics": {name: round(null.families[family].statistic, 4) for name, null in nulls.items()},
        "p": judged.p_families[family],
        "p_adjusted": judged.p_adjusted[family],
        "bank": _rounded(result.bank),
        "bank_best": round(max(result.bank, default=0.0), 4),
        "bank_label": result.label,
        "candidates": len(result.bank),
        "half_collapse_at": _half(family, result.curve),
    }


def _standing_out(found: Found, nulls: Mapping[str, Found]) -> dict[str, float]:
    """How far each family lies above the mean of the nulls, less the median of the same over all families.

    An encoder that is sensitive to everything lies above in all families; a backdoor in one or two.
    """
    if not nulls:
        return {}
    means = {name: fmean(null.statistics[name] for null in nulls.values()) for name in found.statistics}
    excess = {name: value - means[name] for name, value in found.statistics.items()}
    middle = median(excess.values())
    return {name: round(value - middle, 4) for name, value in excess.items()}


def _above_clean(found: Found, nulls: Mapping[str, Found]) -> dict[str, Any]:
    """By family the candidate whose collapse lies furthest above its own on the clean encoders.

    In Fisher's z, above the mean of the nulls. The best of a bank is often a natural weakness, the same in
    all encoders, behind which a backdoor that collapses little is not seen; candidate by candidate it is.
    """
    told: dict[str, Any] = {}
    for family, result in found.families.items():
        banks = [null.families[family].bank for null in nulls.values()]
        if not banks or any(len(bank) != len(result.bank) for bank in banks):
            continue  # a time budget ended the bank early
        excess = excesses(result.bank, banks)
        place = max(range(len(excess)), key=excess.__getitem__)
        told[family] = {
            "excess": round(excess[place], 4),
            "label": result.candidates[place],
            "collapse": round(result.bank[place], 4),
            "on_clean": _rounded([bank[place] for bank in banks]),
        }
    return told


def _half(family: TriggerFamily, curve: list[float]) -> float | None:
    """The weakest level at which the collapse reaches one half."""
    return next((level for level, value in zip(LEVELS[family], curve, strict=True) if value >= 0.5), None)


def _left_out(nulls: Mapping[str, Found], rule: Rule) -> list[dict[str, Any]]:
    """Every clean encoder judged beside the others: what the score is where nothing is wrong."""
    if len(nulls) < 2:
        return []
    values = {name: null.statistics for name, null in nulls.items()}
    return [
        {"name": name, "score": score_of(own, [v for other, v in values.items() if other != name], rule)}
        for name, own in values.items()
    ]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
