"""From the statistics of a suspect and of clean encoders to p-values and a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

from encoderguard.methods import Verdict
from encoderguard.nulls import bank_p, combined, fisher, holm, log_ratios, moderated_p, rank_p, resolution
from encoderguard.search import Measures

__all__ = [
    "Judged",
    "NullKind",
    "Rule",
    "excess_displacement",
    "judge",
    "judge_by_bank",
    "moved",
    "score_of",
    "statistics_of",
    "unlikeness",
]

NullKind = Literal["references", "students", "bank"]
_CLEAR = 4
"""From this many times the false-positive rate on, a p-value counts as clean; between, as inconclusive."""
_MOVED = ", displacement"
_UNLIKE = 2.0
"""From here on a suspect counts as another kind of encoder than the clean ones."""
_NEGLIGIBLE = 0.1
"""Displacements well below this count as none: what moves images so little sends none to another class."""
_FEWEST = 2
"""Clean encoders below which their spread is an assumption, and no verdict rests on it."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How sure a verdict has to be."""

    fpr: float
    margin: float
    prior_spread: float
    moved_spread: float
    unlike: float = 1.0
    """See ``unlikeness``; where it is above 1 the null is so many times wider."""

    def spread_of(self, test: str) -> float:
        """Of clean encoders, expected before any was seen."""
        return self.moved_spread if test.endswith(_MOVED) else self.prior_spread

    @property
    def another_kind(self) -> bool:
        """Whether the suspect differs from the clean encoders where no backdoor would show."""
        return self.unlike >= _UNLIKE

    @property
    def widened(self) -> float:
        """How many times wider than among the clean encoders the null is."""
        return max(1.0, self.unlike)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A verdict and what it rests on."""

    verdict: Verdict
    values: dict[str, float]
    """The statistics, by test."""
    nulls: dict[str, list[float]]
    """The same of every clean encoder."""
    p_tests: dict[str, float]
    p_adjusted: dict[str, float]
    p_value: float
    score: float
    threshold: float
    decided_by: str
    reason: str


def moved(family: str) -> str:
    """The name of a family's second test."""
    return family + _MOVED


def statistics_of(
    found: Measures, nulls: Sequence[Measures]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Statistics by test, of an encoder and of the clean ones it is judged beside.

    A family has two tests: its curve of collapse, and its displacement, how much further than in clean
    encoders the same candidate of the bank moves the features: the largest of ``excess_displacement``,
    less their median over the whole bank, because some encoders are more sensitive to everything. A clean
    encoder's own value is taken beside the other clean ones, so the second test needs two of them; and whole
    banks.
    """
    values, others = dict(found.curves), [dict(null.curves) for null in nulls]
    banks = [null.displacements for null in nulls]
    if len(nulls) < _FEWEST or any(_lengths(bank) != _lengths(found.displacements) for bank in banks):
        return values, others
    values |= _furthest(found.displacements, banks)
    for place, (other, bank) in enumerate(zip(others, banks, strict=True)):
        other |= _furthest(bank, banks[:place] + banks[place + 1 :])
    return values, others


def unlikeness(found: Measures, nulls: Sequence[Measures]) -> float:
    """How much less alike the suspect is to the clean encoders than they are to one another.

    The interquartile range of ``log_ratios`` of displacement over all candidates, divided by the mean of the
    same of each clean encoder beside the others. A backdoor moves images under few candidates and leaves the
    quartiles alone; another pre-training moves them. 1 where it cannot be told: fewer than two clean
    encoders, or banks that are not whole.
    """
    banks = [null.displacements for null in nulls]
    if len(nulls) < _FEWEST or any(_lengths(bank) != _lengths(found.displacements) for bank in banks):
        return 1.0
    own = [_quartiles(bank, banks[:place] + banks[place + 1 :]) for place, bank in enumerate(banks)]
    scale = sum(own) / len(own)
    return _quartiles(found.displacements, banks) / scale if scale > 0 else 1.0


def excess_displacement(values: Sequence[float], references: Sequence[Sequence[float]]) -> list[float]:
    """Candidate by candidate: how much further than in the clean encoders it moves features, a log ratio.

    To all displacements a tenth of that between unrelated images is added, so that what moves nothing much
    is not compared: three times next to nothing is next to nothing.
    """
    return log_ratios(values, references, offset=_NEGLIGIBLE)


def _quartiles(own: Mapping[str, Sequence[float]], others: Sequence[Mapping[str, Sequence[float]]]) -> float:
    ratios = [
        ratio
        for family, values in own.items()
        for ratio in log_ratios(values, [other[family] for other in others])
    ]
    if len(ratios) < 2:
        return 0.0
    low, _, high = quantiles(ratios, n=4)
    return high - low


def _lengths(bank: Mapping[str, Sequence[float]]) -> dict[str, int]:
    return {family: len(values) for family, values in bank.items()}


def _furthest(
    own: Mapping[str, Sequence[float]], others: Sequence[Mapping[str, Sequence[float]]]
) -> dict[str, float]:
    ratios = {
        family: excess_displacement(values, [other[family] for other in others])
        for family, values in own.items()
        if values
    }
    middle = median([ratio for family in ratios.values() for ratio in family] or [0.0])
    return {moved(family): max(values) - middle for family, values in ratios.items()}


def score_of(values: Mapping[str, float], nulls: Sequence[Mapping[str, float]], rule: Rule) -> float:
    """1 minus the smallest p-value of the moderated t over all tests: in [0, 1], large is suspicious."""
    return 1 - min(_moderated(values, nulls, rule).values())


def judge(
    values: Mapping[str, float], nulls: Sequence[Mapping[str, float]], kind: NullKind, rule: Rule
) -> Judged:
    """Judge statistics by test beside those of clean encoders (or students).

    ``backdoored``: the Holm-combined p-value is at most ``fpr`` and, in a test that is significant, the
    value exceeds that of every clean encoder by ``margin``. ``clean``: the combined p-value is at least 4
    times ``fpr``. Otherwise, and with one clean encoder only, with students, or with clean encoders of
    another kind than the suspect, ``inconclusive``.

    The p-values are ranks where there are enough clean encoders of the suspect's kind for ranks to reach
    ``fpr`` after Holm's correction, else those of the moderated t, whose spread is ``unlike`` times that of
    the clean encoders where that is more.
    """
    tests = len(values)
    ranked = resolution(len(nulls)) * tests <= rule.fpr and not rule.another_kind
    by_test = {name: [null[name] for null in nulls] for name in values}
    p = (
        {name: rank_p(value, by_test[name]) for name, value in values.items()}
        if ranked
        else _moderated(values, nulls, rule)
    )
    adjusted, together = holm(p), combined(p)
    excess = {name: value - max(by_test[name]) for name, value in values.items()}
    strong = [name for name in values if adjusted[name] <= rule.fpr and excess[name] >= rule.margin]
    verdict: Verdict = "inconclusive"
    if len(nulls) >= _FEWEST and kind == "references" and not rule.another_kind:
        within = together >= _CLEAR * rule.fpr
        verdict = "backdoored" if strong else "clean" if within else "inconclusive"
    first = min(p, key=lambda name: (p[name], -excess[name]))
    how = "ranks" if ranked else "moderated t and margin"
    told = f"the family '{first}' stands {excess[first]:+.2f} ({_unit(first)}) from the largest of"
    reason = f"{told} {_who(kind, len(nulls))}; combined p {together:.3g} by {how}"
    reason += _remarks(verdict, together, kind, len(nulls), rule)
    return Judged(
        verdict=verdict,
        values=dict(values),
        nulls=by_test,
        p_tests=p,
        p_adjusted=adjusted,
        p_value=together,
        score=score_of(values, nulls, rule),
        threshold=1 - rule.fpr / tests,
        decided_by=how,
        reason=reason,
    )


def _who(kind: NullKind, count: int) -> str:
    return f"{count} clean {kind}" if kind == "references" else f"{count} {kind} of the suspect"


def _remarks(verdict: Verdict, together: float, kind: NullKind, count: int, rule: Rule) -> str:
    """Why the p-value is no verdict, and what was allowed for."""
    remarks = ""
    if count < _FEWEST:
        remarks += f"; with fewer than {_FEWEST} to compare with their spread is unknown, so no verdict"
    elif kind == "students":
        remarks += "; students are not clean encoders of their own, so no verdict: give references"
    elif verdict == "inconclusive" and together <= rule.fpr and not rule.another_kind:
        remarks += f"; significant, but not {rule.margin:g} above all of them"
    if kind == "references" and rule.widened >= 1.05:
        remarks += (
            f"; ordinary candidates move the suspect {rule.widened:.1f} times as unevenly as the references, "
            "so the null was widened as much"
        )
    if kind == "references" and rule.another_kind:
        remarks += ", but such references carry no verdict: give some that were trained as it was"
    return remarks


def _unit(test: str) -> str:
    return "logarithm of a ratio" if test.endswith(_MOVED) else "mean Fisher z"


def judge_by_bank(values: Mapping[str, float], banks: Mapping[str, Sequence[float]]) -> Judged:
    """Without any clean encoder: p-values from the spread within the bank, and never a verdict.

    Natural weaknesses of clean encoders stand out of the bank as much as backdoors do. The score is
    the largest statistic s as s / (1 + s).

    Args:
        values: statistics by family.
        banks: all collapses in the bank, by family.
    """
    scales = {name: [fisher(value) for value in banks[name]] for name in values}
    p = {name: bank_p(max(scale, default=0.0), scale) for name, scale in scales.items()}
    return Judged(
        verdict="inconclusive",
        values=dict(values),
        nulls={},
        p_tests=p,
        p_adjusted=holm(p),
        p_value=combined(p),
        score=max(value / (1 + value) if value > 0 else 0.0 for value in values.values()),
        threshold=1.0,
        decided_by="spread within the bank",
        reason="no clean encoder and no student to compare with: the spread within the bank tells how "
        "triggers differ, not how clean encoders do; give references or ask for students",
    )


def _moderated(
    values: Mapping[str, float], nulls: Sequence[Mapping[str, float]], rule: Rule
) -> dict[str, float]:
    return {
        name: moderated_p(
            value,
            [null[name] for null in nulls],
            prior_spread=rule.spread_of(name),
            widened=rule.widened,
        )
        for name, value in values.items()
    }
