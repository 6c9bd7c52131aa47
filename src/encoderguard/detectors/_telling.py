"""Which of a family's triggers show what gave the suspect away, and which to unlearn."""

from collections.abc import Sequence

from encoderguard.detectors._trigger_evidence import furthest
from encoderguard.detectors._trigger_verdict import Judged, moved
from encoderguard.rays import TriggerFamily
from encoderguard.search import FamilyResult, Found
from encoderguard.triggers import Trigger

__all__ = ["smallest_p", "telling", "to_unlearn"]


def smallest_p(judged: Judged, family: TriggerFamily) -> float:
    """Of the family's two tests."""
    return min(judged.p_tests.get(test, 1.0) for test in (family, moved(family)))


def telling(found: Found, nulls: Sequence[Found], judged: Judged, family: TriggerFamily) -> Trigger:
    """The trigger of the family's more significant test."""
    result = found.families[family]
    if not _moves(judged, family):
        return result.weakest
    ray = result.tried[furthest(found, nulls, family)]
    return ray.at(ray.strength)


def to_unlearn(
    result: FamilyResult, told: Trigger, judged: Judged, family: TriggerFamily, fpr: float
) -> tuple[Trigger, Trigger | None]:
    """The strongest trigger and the plain one, of the test that gave the family away.

    Where that is displacement the plain one is the candidate that moves features most (``told``). The
    triggers that make features collapse most come beside it only if they are significant too: otherwise
    they are natural ones, which unlearning would spend itself on.
    """
    if not _moves(judged, family):
        return result.strongest, result.plain
    return (result.strongest if judged.p_adjusted[family] <= fpr else told), told


def _moves(judged: Judged, family: TriggerFamily) -> bool:
    return judged.p_tests.get(moved(family), 1.0) < judged.p_tests[family]
