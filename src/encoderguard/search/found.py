"""What a trigger search may spend, and what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from encoderguard.nulls import fisher
from encoderguard.rays import Ray, TriggerFamily
from encoderguard.triggers import Trigger

__all__ = ["Budget", "FamilyResult", "Found", "Measures"]

_SHARES = {"bank": 0.35, "refine": 0.7, "levels": 0.9}
"""Of the time budget: when each stage has to be done."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to search."""

    keep: int
    """Candidates per family that are tried at every level, and refined."""
    starts: int
    """Starts of each refinement; those beyond ``keep`` are random."""
    steps: int
    """Steps of each refinement; 0 refines nothing."""
    seconds: float | None
    """Time for one encoder."""

    def deadline(self, begun: float, stage: str) -> float:
        """Of ``time.monotonic``."""
        return float("inf") if self.seconds is None else begun + _SHARES[stage] * self.seconds


@dataclass(kw_only=True)
class FamilyResult:
    """What one family gave."""

    bank: list[float] = field(default_factory=list)
    """Collapse under each candidate at the bank's own strength, on a few images."""
    displacements: list[float] = field(default_factory=list)
    """The displacement under each."""
    tried: list[Ray] = field(default_factory=list)
    """The candidates themselves."""
    rays: list[Ray] = field(default_factory=list)
    """The best candidates, later with refined ones."""
    label: str = ""
    """The bank's best candidate."""
    best: dict[float, tuple[float, Trigger]] = field(default_factory=dict)
    """Per level: collapse on the images searched with, and the trigger."""
    curve: list[float] = field(default_factory=list)
    """Collapse on held-out images at each level, or at a weaker one if that gave more."""
    measured: list[float] = field(default_factory=list)
    """The same without the last clause."""
    plain: Trigger | None = None
    """Of the bank's best candidates the one that collapses most, at its best level: before any refinement."""
    refined: bool = False
    """Whether gradients were tried."""
    read: tuple[Trigger, Trigger] | None = None
    """``weakest`` and ``strongest`` of a search that was read from a file, which holds no other trigger."""

    @property
    def statistic(self) -> float:
        """The mean of the curve in Fisher's z: large if weak triggers already collapse the features.

        The scale keeps the difference between .98 and .999, which a mean of cosines would lose.
        """
        return fmean(map(fisher, self.curve))

    @property
    def weakest(self) -> Trigger:
        """The trigger of the weakest level that reaches nine tenths of the largest collapse: what to show."""
        if self.read is not None:
            return self.read[0]
        level = next(k for k, value in enumerate(self.curve) if value >= 0.9 * self.curve[-1])
        return self.best[sorted(self.best)[level]][1]

    @property
    def strongest(self) -> Trigger:
        """The trigger of the level with the largest collapse: what to unlearn."""
        if self.read is not None:
            return self.read[1]
        level = max(range(len(self.measured)), key=lambda k: self.measured[k])
        return self.best[sorted(self.best)[level]][1]

    def offer(self, level: float, value: float, trigger: Trigger) -> None:
        """Keep the better of what is known and what is offered."""
        if level not in self.best or value > self.best[level][0]:
            self.best[level] = (value, trigger)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a search measured on one encoder, by family."""

    curves: Mapping[str, float]
    """The mean of the collapse over strength, in Fisher's z."""
    displacements: Mapping[str, Sequence[float]]
    """Under each candidate of the bank; none where it is not known."""


@dataclass(kw_only=True)
class Found:
    """What the search found on one encoder."""

    families: dict[TriggerFamily, FamilyResult]
    seconds: dict[str, float]
    images_passed: int
    complete: bool
    """False if the time budget ended a stage early."""

    @property
    def measures(self) -> Measures:
        """What is compared with other encoders."""
        return Measures(
            curves={family: result.statistic for family, result in self.families.items()},
            displacements={family: result.displacements for family, result in self.families.items()},
        )
