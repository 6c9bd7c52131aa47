"""How unusual is a value beside the same value of clean encoders? P-values, and how far each can be trusted.

With m references a rank p-value is at least 1 / (m + 1), so that 19 are needed for .05 and, tested in several
families, more. A parametric p-value goes further, at the price of an assumption about the spread. Both are
here, and neither pretends to be the other.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from scipy.stats import norm, t

from encoderguard.errors import SettingError

__all__ = [
    "bank_p",
    "combined",
    "fisher",
    "holm",
    "log_ratios",
    "moderated_p",
    "rank_p",
    "resolution",
]

_MOST = 0.9995
_NORMAL_MAD = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation


def fisher(value: float) -> float:
    """Fisher's z of a cosine in [-1, 1], a saturating scale made even; .9995 and above are one."""
    return math.atanh(max(-_MOST, min(_MOST, value)))


def log_ratios(
    values: Sequence[float], references: Sequence[Sequence[float]], *, offset: float = 0.03
) -> list[float]:
    """Value by value: the logarithm of its ratio to the geometric mean of the references' own.

    Args:
        values: at least 0; one per candidate.
        references: at least one row of as many values.
        offset: added to all, so that a ratio of two values near 0 is near 1.
    """
    logs = [[math.log(max(value, 0.0) + offset) for value in row] for row in (values, *references)]
    return [own - fmean(others) for own, *others in zip(*logs, strict=True)]


def resolution(count: int) -> float:
    """The smallest rank p-value that ``count`` references can give: ``1 / (m + 1)``."""
    return 1 / (count + 1)


def rank_p(value: float, references: Sequence[float]) -> float:
    """``(1 + #{references >= value}) / (m + 1)``: valid if suspect and references are exchangeable.

    No references give 1.
    """
    return (1 + sum(reference >= value for reference in references)) * resolution(len(references))


def moderated_p(
    value: float,
    references: Sequence[float],
    *,
    prior_spread: float,
    prior_df: float = 4.0,
    widened: float = 1.0,
) -> float:
    """One-sided p-value of a new value beside few normal references, with a moderated t statistic.

    The variance of the references is drawn towards ``prior_spread ** 2`` with the weight of ``prior_df``
    degrees of freedom (Smyth 2004, "Linear models and empirical Bayes methods"), because the spread of two or
    three values says little. ``t = (x - mean) / (s sqrt(1 + 1 / m))`` with ``prior_df + m - 1`` degrees,
    the whole spread times ``widened``.

    Raises:
        SettingError: no references, or a prior that is not positive.
    """
    centre, scale, df = _moderated(references, prior_spread, prior_df)
    return float(t.sf((value - centre) / (scale * widened), df))


def _moderated(references: Sequence[float], prior: float, prior_df: float) -> tuple[float, float, float]:
    count = len(references)
    if count == 0:
        raise SettingError("A p-value beside references needs at least one reference, found none; give some.")
    if prior <= 0 or prior_df <= 0:
        raise SettingError(
            f"The prior spread and its degrees of freedom must be above 0, found {prior:g} and {prior_df:g}."
        )
    centre = fmean(references)
    df = prior_df + count - 1
    squares = sum((reference - centre) ** 2 for reference in references)
    variance = (prior_df * prior**2 + squares) / df
    return centre, math.sqrt(variance * (1 + 1 / count)), df


def bank_p(best: float, bank: Sequence[float]) -> float:
    """The last resort: how far the best of a bank of triggers stands out from the bank on the same encoder.

    A robust z (median and median absolute deviation), its normal tail, times the size of the bank. It
    measures how triggers differ, not how clean encoders do: a natural weakness stands out in the same way,
    so nobody should be accused on it alone. Fewer than four, or equal, values give 1.
    """
    if len(bank) < 4:
        return 1.0
    middle = median(bank)
    spread = _NORMAL_MAD * median(abs(value - middle) for value in bank)
    if spread <= 0:
        return 1.0
    return min(1.0, len(bank) * float(norm.sf((best - middle) / spread)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (1979): compared with alpha, at most alpha of the rejections are false.

    The k-th smallest of n is multiplied by ``n - k + 1``, never falls below the one before, and is at most
    1. Names keep their order. Valid however the tests depend on one another.
    """
    adjusted, running = dict[str, float](), 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def combined(p_values: Mapping[str, float]) -> float:
    """The p-value of "all of these are null": the smallest after ``holm``; 1 if there are none."""
    return min(holm(p_values).values(), default=1.0)
