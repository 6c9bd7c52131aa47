"""P-values by hand: ranks, the moderated t, the bank's spread, Holm."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from encoderguard.errors import SettingError
from encoderguard.nulls import (
    bank_p,
    combined,
    fisher,
    holm,
    moderated_p,
    rank_p,
    resolution,
)


def test_a_rank_p_value_counts_references_that_are_as_large() -> None:
    assert rank_p(0.9, [0.1, 0.2, 0.3]) == 1 / 4
    assert rank_p(0.2, [0.1, 0.2, 0.3]) == 3 / 4  # a tie counts against the suspect
    assert rank_p(0.0, [0.1, 0.2, 0.3]) == 1
    assert rank_p(0.9, []) == 1


def test_nineteen_references_are_needed_for_five_per_cent() -> None:
    assert resolution(19) == 0.05
    assert resolution(18) > 0.05
    assert rank_p(1, [0.0] * 19) == 0.05


def test_fishers_z_is_even_and_bounded() -> None:
    assert fisher(0.5) == pytest.approx(0.5 * math.log(3))
    assert fisher(-0.5) == -fisher(0.5)
    assert fisher(1.0) == fisher(0.9999) < 5


def test_one_reference_relies_on_the_prior_alone() -> None:
    # t = (1 - 0) / (.5 sqrt 2) = sqrt 2 with 4 degrees of freedom
    assert moderated_p(1.0, [0.0], prior_spread=0.5) == pytest.approx(float(t.sf(math.sqrt(2), 4)))


def test_the_prior_is_one_voice_among_the_references() -> None:
    # references -1, 1: squares 2, one degree; prior .5 with one degree: variance (.25 + 2) / 2 = 1.125
    expected = float(t.sf(3 / math.sqrt(1.125 * 1.5), 2))
    assert moderated_p(3.0, [-1.0, 1.0], prior_spread=0.5, prior_df=1) == pytest.approx(expected)
    assert moderated_p(0.0, [-1.0, 1.0], prior_spread=0.5) == pytest.approx(0.5)
    wide = moderated_p(1.0, [0.0], prior_spread=0.5, widened=2)  # twice the root of .25 * 2
    assert wide == pytest.approx(float(t.sf(math.sqrt(0.5), 4)))


def test_references_and_a_positive_prior_are_needed() -> None:
    with pytest.raises(SettingError, match="needs at least one reference, found none"):
        moderated_p(1.0, [], prior_spread=0.2)
    with pytest.raises(SettingError, match="must be above 0, found 0 and 4"):
        moderated_p(1.0, [1.0], prior_spread=0.0)


def test_the_spread_of_the_bank_by_hand() -> None:
    bank = [-2.0, -1.0, 0.0, 1.0, 2.0]  # median 0, median absolute deviation 1
    z = 4 / 1.4826
    assert bank_p(4.0, bank) == pytest.approx(5 * 0.5 * math.erfc(z / math.sqrt(2)))
    assert bank_p(0.0, bank) == 1  # five times one half, capped
    assert bank_p(9.0, [1.0, 1.0, 1.0, 1.0]) == 1  # no spread, no statement
    assert bank_p(9.0, [1.0, 2.0]) == 1


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(found) == ["a", "b", "c"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert combined({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(0.03)
    assert combined({}) == 1
    assert holm({}) == {}


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert all(p_values[name] <= adjusted[name] <= 1 for name in p_values)
    for a in p_values:
        assert all(adjusted[a] <= adjusted[b] for b in p_values if p_values[a] < p_values[b])
