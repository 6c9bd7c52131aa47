"""MOTH (Tao et al. 2022): triggers from class to class are made harder to find, by training against them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from encoderguard.clusters import Clusters
from encoderguard.encoder import Encoder
from encoderguard.feature_heads import Head, cluster_head
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, History, Purified
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, PseudoClasses, Repair, begin
from encoderguard.run import Run
from encoderguard.smallest import AnswerPlan, Smallest, random_stamp, smallest_per_answer
from encoderguard.training import Plan
from encoderguard.triggers import MaskedPattern
from encoderguard.unlearning import FORGET, unlearn

__all__ = ["MOTH", "choose_pair", "small_enough"]


def choose_pair(
    growth: Tensor, usable: Tensor, explore: float, generator: torch.Generator
) -> tuple[int, int]:
    """Two different clusters: mostly the pair whose trigger has grown most, else a random one.

    Args:
        growth: ``[K, K]``, how much larger the trigger from row to column became; ``-inf`` where unknown.
        usable: bool ``[K]``; only clusters of enough images are drawn.
        explore: chance of a random pair; so it is as long as no growth is known.
        generator: of the draws.

    Returns:
        Where the trigger starts and where it leads.
    """
    if bool(growth.isfinite().any()) and float(torch.rand((), generator=generator)) >= explore:
        best = int(growth.argmax())
        return best // len(growth), best % len(growth)
    choices = usable.nonzero().flatten()
    first, second = choices[torch.randperm(len(choices), generator=generator)[:2]].tolist()
    return first, second


def small_enough(found: Sequence[Smallest], largest: float) -> list[MaskedPattern]:
    """The triggers that were found and whose mask has a mean of at most ``largest``."""
    return [
        entry.trigger
        for entry in found
        if entry.trigger is not None and entry.size is not None and entry.size <= largest
    ]


@dataclass
class _State:
    """What goes from round to round."""

    student: Encoder
    utility: float
    history: History = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    fallback: str | None = None


@register
@final
@dataclass(frozen=True, kw_only=True)
class MOTH(Defense):
    """Searches triggers towards clusters of clean images and trains the encoder to ignore them, in turns.

    Departs from the paper, which hardens distances between labelled classes: clusters of the suspect's
    features stand for classes, and stamped images are drawn to the suspect's features of the clean image
    where the paper has the cross-entropy. The first searches, one per cluster, are one batch; then follow
    pairs of clusters in both directions. A pair's triggers are trained on with images of every cluster. The
    authors' budget of two epochs assumes all training data, so the budget here is in steps.
    """

    name: ClassVar[str] = "moth"
    paper: ClassVar[str] = "Tao et al., Model Orthogonalization, IEEE S&P 2022"
    year: ClassVar[int] = 2022
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a search per cluster and per round, and fine-tuning between them"
    blind_spots: ClassVar[str] = (
        "Backdoors whose trigger is larger than a quarter of the image or differs from image to image, and "
        "targets that no cluster of clean images is near."
    )

    clusters: Clusters = 10
    """Clusters of clean features in the place of classes."""
    rounds: Annotated[int, Field(ge=0)] = 8
    """Pairs of clusters that are hardened after the warm-up."""
    warm_up_steps: Annotated[int, Field(ge=1)] = 100
    """Hardening steps on the triggers of all clusters; rounded up to whole passes over the images."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Hardening steps per pair; likewise."""
    warm_up_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the images that is stamped in the warm-up."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the images that is stamped afterwards."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Chance of a random pair; else the pair whose trigger grew most."""
    largest: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Triggers with a larger mean of the mask are not used."""
    success: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the images that a trigger must move for its mask to count."""
    search_steps: Annotated[int, Field(ge=1)] = 200
    """Steps of the search of the warm-up, all clusters at once."""
    pair_steps: Annotated[int, Field(ge=1)] = 50
    """Steps of the search from one cluster to another."""
    search_batch: Annotated[int, Field(ge=2)] = 32
    """Images per step and trigger of a search."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per hardening step."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """SGD's learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch with at least this utility counts; the round in which it is not reached is the last."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises ImageError with fewer images than clusters."""
        repair = begin(
            encoder, images, batch_size=self.batch_size, floor=self.utility_floor, purpose="MOTH", run=run
        )
        head, classes = cluster_head(repair.suspect, repair.images, self.clusters, run=run)
        state = _State(repair.suspect, 1.0)
        warm = self._search(state, repair.images, head, range(self.clusters), self.search_steps, run, 0)
        self._harden(state, repair, warm, self.warm_up_steps, self.warm_up_share, run)
        self._pairs(state, repair, head, classes, run)
        evidence = {
            "clusters": self.clusters,
            "rounds": state.rounds,
            "utility_after": state.utility,
            "utility_floor": self.utility_floor,
            "held_out": repair.gate.count,
            "fallback": state.fallback or self._untouched(state),
        }
        result = state.student.clone().eval().requires_grad_(True)
        return Purified(encoder=result, history=state.history, evidence=evidence)

    def _pairs(self, state: _State, repair: Repair, head: Head, classes: PseudoClasses, run: Run) -> None:
        usable = torch.bincount(classes.labels, minlength=self.clusters) >= 2
        growth = torch.full((self.clusters, self.clusters), -torch.inf)
        sizes: dict[tuple[int, int], float] = {}
        for number in range(1, self.rounds + 1):
            if state.fallback or int(usable.sum()) < 2:
                return
            a, b = choose_pair(growth, usable, self.explore, run.rng.generator("pair", number))
            found = []
            for start, end in ((a, b), (b, a)):
                own = repair.images.subset((classes.labels == start).nonzero().flatten())
                part = run.child(f"from-{start}")
                (entry,) = self._search(state, own, head, [end], self.pair_steps, part, number)
                found.append(entry)
                size = 1.0 if entry.size is None else entry.size  # none found is as hard as it gets
                grown = size / sizes.get((start, end), size) - 1
                growth[start, end] = grown if small_enough([entry], self.largest) else -torch.inf
                sizes[start, end] = max(size, 1e-6)
            self._harden(state, repair, found, self.steps, self.share, run)
            state.rounds[-1]["pair"] = [a, b]

    def _search(
        self,
        state: _State,
        images: ImageSet,
        head: Head,
        wanted: Sequence[int],
        steps: int,
        run: Run,
        number: int,
    ) -> list[Smallest]:
        plan = AnswerPlan(success=self.success, steps=steps, batch_size=self.search_batch)
        return smallest_per_answer(
            state.student, images, head, wanted, plan, run=run.child(f"search-{number}")
        )

    def _harden(
        self, state: _State, repair: Repair, found: list[Smallest], steps: int, share: float, run: Run
    ) -> None:
        """Train on the triggers that are small enough; a round without one changes nothing."""
        told: dict[str, Any] = {"sizes": [entry.size for entry in found], "epochs": 0}
        triggers = small_enough(found, self.largest)
        number = len(state.rounds)
        state.rounds.append(told)
        if not triggers:
            return
        plan = Plan(
            epochs=math.ceil(steps / (len(repair.images) // self.batch_size)),
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
        )
        done = unlearn(
            state.student,
            repair.suspect,
            random_stamp(triggers, share),
            repair,
            loss=FORGET,
            plan=plan,
            views=False,
            run=run.child(f"harden-{number}"),
        )
        for name, values in done.history.items():
            state.history.setdefault(name, []).extend(values)
        state.student, state.utility, told["epochs"] = done.encoder.frozen(), done.utility, done.epochs
        state.fallback = done.evidence(repair.gate)["fallback"]

    def _untouched(self, state: _State) -> str | None:
        if state.history:
            return None
        return (
            "No trigger was found that moves enough images and covers little enough, so there was nothing to "
            "harden against; the encoder is returned as it was."
        )
