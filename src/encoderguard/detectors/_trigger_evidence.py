"""What a reader needs to judge a trigger search, as JSON values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from encoderguard.detectors._trigger_verdict import (
    Judged,
    NullKind,
    Rule,
    excess_displacement,
    moved,
    score_of,
    statistics_of,
)
from encoderguard.nulls import resolution
from encoderguard.rays import LEVELS, UNITS, TriggerFamily
from encoderguard.search import CLEAN_AT_MOST, interaction
from encoderguard.search.found import Found

__all__ = ["evidence_of", "furthest"]

_NOT_TESTED = [
    "Triggers that differ from image to image, that a generator makes, or that are things in the scene.",
    "Patches with a side above a third of the image, and changes stronger than the levels listed.",
    "Backdoors that several triggers must set off together.",
    "Inputs unlike the given images; the downstream classifier and the code that loads the encoder.",
]


def evidence_of(
    found: Found, nulls: Mapping[str, Found], judged: Judged, kind: NullKind, *, rule: Rule
) -> dict[str, Any]:
    """Reason, p-values, one curve per family with the range of the null, what was and was not tested."""
    tried = {family: len(result.bank) for family, result in found.families.items()}
    alone = _interaction(found, nulls)
    return {
        "reason": judged.reason + (_hint(alone) if kind == "bank" else ""),
        "direction": "a larger score is more suspicious",
        "flagged": "above",
        "null": kind,
        "null_size": len(nulls),
        "rank_resolution": resolution(len(nulls)),
        "decided_by": judged.decided_by,
        "fpr": rule.fpr,
        "unlike": round(rule.unlike, 3),
        "complete": found.complete and all(null.complete for null in nulls.values()),
        "families": {family: _family(family, found, nulls, judged) for family in found.families},
        "standing_out": _standing_out(found, nulls),
        "interaction": alone,
        "clean_references": _left_out(nulls, rule),
        "images_passed": found.images_passed,
        "tested": [
            f"{family}: {count} candidates{_refined(found, family)}" for family, count in tried.items()
        ],
        "not_tested": _NOT_TESTED,
    }


def _interaction(found: Found, nulls: Mapping[str, Found]) -> dict[str, Any] | None:
    """How much further a patch moves the features than its colour and its place explain."""
    if "patch" not in found.families:
        return None
    value, ray = interaction(found.families["patch"])
    if ray is None:
        return None
    on_clean = {
        name: round(interaction(null.families["patch"])[0], 4)
        for name, null in nulls.items()
        if null.families["patch"].tried
    }
    return {"value": round(value, 4), "label": ray.label, "on_clean": on_clean}


def _hint(alone: Mapping[str, Any] | None) -> str:
    """What the interaction adds where there is no clean encoder to compare with."""
    if alone is None or alone["value"] <= CLEAN_AT_MOST:
        return ""
    return (
        f"; but a patch ({alone['label']}) moves the features further than its colour and its place explain: "
        f"interaction {alone['value']:.2f}, where the largest of 27 clean encoders has {CLEAN_AT_MOST:g}"
    )


def _refined(found: Found, family: TriggerFamily) -> str:
    levels = ", ".join(f"{level:g}" for level in LEVELS[family])
    more = " and gradient refinement" if found.families[family].refined else ""
    return f"{more}, at {levels} ({UNITS[family]})."


def _family(
    family: TriggerFamily, found: Found, nulls: Mapping[str, Found], judged: Judged
) -> dict[str, Any]:
    result = found.families[family]
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
        "p": judged.p_tests[family],
        "p_adjusted": judged.p_adjusted[family],
        "moved": _moved(family, found, nulls, judged),
        "bank": _rounded(result.bank),
        "displacements": _rounded(result.displacements),
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
    own, others = found.measures.curves, [null.measures.curves for null in nulls.values()]
    excess = {name: value - fmean(other[name] for other in others) for name, value in own.items()}
    middle = median(excess.values())
    return {name: round(value - middle, 4) for name, value in excess.items()}


def _moved(
    family: TriggerFamily, found: Found, nulls: Mapping[str, Found], judged: Judged
) -> dict[str, Any] | None:
    """The family's second test: the candidate that moves the features furthest beside the clean encoders."""
    test = moved(family)
    if test not in judged.p_tests:
        return None
    others = {name: null.families[family] for name, null in nulls.items()}
    result, place = found.families[family], furthest(found, list(nulls.values()), family)
    return {
        "statistic": round(judged.values[test], 4),
        "null_statistics": {
            name: round(value, 4) for name, value in zip(nulls, judged.nulls[test], strict=True)
        },
        "p": judged.p_tests[test],
        "p_adjusted": judged.p_adjusted[test],
        "label": result.tried[place].label,
        "displacement": round(result.displacements[place], 4),
        "on_clean": {name: round(other.displacements[place], 4) for name, other in others.items()},
    }


def furthest(found: Found, nulls: Sequence[Found], family: TriggerFamily) -> int:
    """Which candidate of the bank moves the features furthest beside the clean encoders."""
    banks = [null.families[family].displacements for null in nulls]
    ratios = excess_displacement(found.families[family].displacements, banks)
    return max(range(len(ratios)), key=ratios.__getitem__)


def _half(family: TriggerFamily, curve: list[float]) -> float | None:
    """The weakest level at which the collapse reaches one half."""
    return next((level for level, value in zip(LEVELS[family], curve, strict=True) if value >= 0.5), None)


def _left_out(nulls: Mapping[str, Found], rule: Rule) -> list[dict[str, Any]]:
    """Every clean encoder judged beside the others: what the score is where nothing is wrong."""
    if len(nulls) < 2:
        return []
    measures = {name: null.measures for name, null in nulls.items()}
    told = []
    for name, own in measures.items():
        others = [value for other, value in measures.items() if other != name]
        told.append({"name": name, "score": score_of(*statistics_of(own, others), replace(rule, unlike=1.0))})
    return told


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
