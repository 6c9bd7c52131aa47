"""Neural Cleanse's mitigation (Wang et al. 2019): unlearn the found trigger, or prune what it activates."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from encoderguard.clusters import Clusters, outlier_indices
from encoderguard.encoder import Encoder
from encoderguard.feature_heads import cluster_head
from encoderguard.features import extract
from encoderguard.hidden import Units, last_stage_units
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.pruning import bake, channel_activations, masked
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, Repair, begin
from encoderguard.run import Run
from encoderguard.smallest import (
    AnswerPlan,
    CollapsePlan,
    Smallest,
    random_stamp,
    smallest_collapse,
    smallest_per_answer,
)
from encoderguard.training import Plan
from encoderguard.triggers import MaskedPattern
from encoderguard.unlearning import FORGET, unlearn

__all__ = ["NeuralCleanse", "left_over", "suspects", "without_most_raised"]

_FEWEST_SIZES = 8
_GONE = "the effect is gone"


def suspects(sizes: list[float | None], threshold: float) -> list[int]:
    """Which triggers to act on: the outliers among at least eight sizes, else the smallest alone."""
    known = [k for k, size in enumerate(sizes) if size is not None]
    if not known:
        return []
    values = torch.tensor([float(sizes[k] or 0) for k in known])
    flagged = []
    if len(known) >= _FEWEST_SIZES:
        flagged = [known[k] for k in (outlier_indices(values) > threshold).nonzero().flatten().tolist()]
    return flagged or [known[int(values.argmin())]]


def without_most_raised(gaps: Tensor, share: float) -> Tensor:
    """Mask ``[C]``, True keeps, without the ``floor(share C)`` channels that a trigger raises most.

    Channels that it does not raise stay.

    Args:
        gaps: ``[C]``, mean activation with the trigger minus that without.
        share: in [0, 1].
    """
    mask = torch.ones(len(gaps), dtype=torch.bool)
    most = gaps.argsort(descending=True, stable=True)[: int(share * len(gaps) + 1e-9)]
    mask[most[gaps[most] > 0]] = False
    return mask


def left_over(stamped: float, clean: float) -> float:
    """How much of the way from the clean level to the full effect, 1, a trigger still goes: 0 is none."""
    return (stamped - clean) / max(1 - clean, 1e-6)


@register
@final
@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Defense):
    """Finds the smallest trigger, then makes the encoder ignore it in one of the paper's two ways.

    Departs from the paper, which needs classes: clusters of clean images stand for them, or the trigger makes
    all images look alike. Unlearning draws stamped images to the suspect's features of the clean ones,
    where the paper has labels. Pruning is inside the encoder's last stage, not in front of a classifier, and
    ends when the trigger's effect is gone or the utility would break. BackdoorBench's code unlearns.
    """

    name: ClassVar[str] = "neural_cleanse"
    paper: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    year: ClassVar[int] = 2019
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a search through the frozen encoder, then fine-tuning or forward passes"
    blind_spots: ClassVar[str] = (
        "What the search does not find: triggers that cover the image or differ from image to image."
    )

    form: Literal["unlearn", "prune"] = "unlearn"
    """What is done with the trigger."""
    objective: Literal["universal", "clusters"] = "clusters"
    """One trigger per cluster of clean images, or one that makes all images look alike."""
    clusters: Clusters = 10
    """Clusters of clean images, for ``clusters``."""
    threshold: Annotated[float, Field(gt=0)] = 2.0
    """Anomaly index above which a cluster's trigger is acted on; without any, the smallest is."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Mean cosine of stamped images above which a universal trigger counts."""
    feature_space: Literal["raw", "standardised"] = "raw"
    """Where these cosines are taken."""
    success: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of all images that a cluster's trigger must move."""
    restarts: Annotated[int, Field(ge=1)] = 3
    """Random starts of the universal search."""
    search_steps: Annotated[int, Field(ge=1)] = 600
    """Steps of the search at most."""
    search_batch: Annotated[int, Field(ge=2)] = 64
    """Images per step and trigger of the search."""
    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the clean images, to unlearn."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step, to unlearn."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """SGD's learning rate; falls to zero along a cosine."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """SGD's weight decay."""
    prune_step: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the channels of each layer that is taken out per step, to prune."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Pruning ends when this share of the trigger's effect is left."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch, or step of pruning, with at least this utility counts."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises EncoderError if there are no hidden channels to prune."""
        repair = begin(
            encoder,
            images,
            batch_size=self.batch_size,
            floor=self.utility_floor,
            purpose="Neural Cleanse",
            run=run,
        )
        layers = last_stage_units(repair.suspect) if self.form == "prune" else []
        found = self._search(repair, run.child("search"))
        chosen = suspects([entry.size for entry in found], self.threshold)
        evidence: dict[str, Any] = {
            "form": self.form,
            "objective": self.objective,
            "found": [{"size": entry.size, "effect": entry.value} for entry in found],
            "acted_on": chosen,
        }
        if not chosen:
            return _unchanged(repair, evidence)
        acted = [found[k] for k in chosen]
        done = self._prune(repair, layers, acted, run) if layers else self._unlearn(repair, acted, run)
        remaining = _worst(done.encoder, repair.images, acted, run)
        return Purified(
            encoder=done.encoder,
            history=done.history,
            evidence=evidence | done.evidence | {"effect_left": remaining},
        )

    def _search(self, repair: Repair, run: Run) -> list[Smallest]:
        if self.objective == "universal":
            plan = CollapsePlan(
                beta=self.beta,
                restarts=self.restarts,
                steps=self.search_steps,
                batch_size=self.search_batch,
                standardised=self.feature_space == "standardised",
            )
            return [smallest_collapse(repair.suspect, repair.images, plan, run=run)]
        head, _ = cluster_head(repair.suspect, repair.images, self.clusters, run=run)
        how = AnswerPlan(success=self.success, steps=self.search_steps, batch_size=self.search_batch)
        return smallest_per_answer(repair.suspect, repair.images, head, range(self.clusters), how, run=run)

    def _unlearn(self, repair: Repair, acted: list[Smallest], run: Run) -> Purified:
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        stamp = random_stamp([trigger for trigger, _ in _pairs(acted)])
        done = unlearn(
            repair.suspect, repair.suspect, stamp, repair, loss=FORGET, plan=plan, views=False, run=run
        )
        return Purified(encoder=done.encoder, history=done.history, evidence=done.evidence(repair.gate))

    def _prune(self, repair: Repair, layers: list[Units], acted: list[Smallest], run: Run) -> Purified:
        """The mask of the last step above the floor, or of the first that leaves no effect."""
        suspect = repair.suspect
        gaps = [_gap(suspect, units, repair.images, acted, run) for units in layers]
        kept = [torch.ones(units.count, dtype=torch.bool) for units in layers]
        curves: dict[str, list[float]] = {"utility": [], "effect left": []}
        steps, ended = int(1 / self.prune_step + 1e-9), "all raised channels are out"
        for number in range(1, steps + 1):
            masks = [without_most_raised(values, number * self.prune_step) for values in gaps]
            with ExitStack() as stack:
                for units, mask in zip(layers, masks, strict=True):
                    stack.enter_context(masked(suspect, units, mask))
                curves["utility"].append(repair.gate.measure(suspect))
                curves["effect left"].append(_worst(suspect, repair.images, acted, run))
            run.progress("pruning", number, steps, f"utility {curves['utility'][-1]:.3f}")
            if curves["utility"][-1] < self.utility_floor:
                ended = "the next step would take the utility below the floor"
                break
            kept = masks
            if curves["effect left"][-1] <= self.tolerance:
                ended = _GONE
                break
        result = suspect
        for units, mask in zip(layers, kept, strict=True):
            result = bake(result, units, mask)
        evidence = _pruned(layers, kept) | {
            "ended_because": ended,
            "utility_after": repair.gate.measure(result),
            "utility_floor": self.utility_floor,
            "held_out": repair.gate.count,
            "fallback": None if ended == _GONE else f"The trigger keeps an effect after pruning: {ended}.",
        }
        return Purified(encoder=result.eval().requires_grad_(True), history=curves, evidence=evidence)


def _unchanged(repair: Repair, evidence: dict[str, Any]) -> Purified:
    reason = (
        "No trigger was found that has its effect on all images, so there is nothing to remove; the encoder "
        "is returned as it was."
    )
    same = repair.suspect.clone().eval().requires_grad_(True)
    return Purified(encoder=same, history={}, evidence=evidence | {"fallback": reason})


def _pruned(layers: list[Units], kept: list[Tensor]) -> dict[str, Any]:
    pairs = zip(layers, kept, strict=True)
    return {"pruned": {units.producer: (~mask).nonzero().flatten().tolist() for units, mask in pairs}}


def _pairs(acted: list[Smallest]) -> list[tuple[MaskedPattern, Callable[[Tensor], float]]]:
    return [(entry.trigger, entry.effect) for entry in acted if entry.trigger is not None]


def _gap(encoder: Encoder, units: Units, images: ImageSet, acted: list[Smallest], run: Run) -> Tensor:
    """The largest rise of each channel's mean activation under any of the triggers: ``[C]``."""
    clean = channel_activations(encoder, units, images, run)
    rises = [
        channel_activations(encoder, units, images, run, trigger=trigger) - clean
        for trigger, _ in _pairs(acted)
    ]
    return torch.stack(rises).amax(0)


def _worst(encoder: Encoder, images: ImageSet, acted: list[Smallest], run: Run) -> float:
    """What is left of the strongest trigger's effect, beside clean images in the same encoder."""
    clean = extract(encoder, images, run=run)
    return max(
        left_over(effect(extract(encoder, images, run=run, trigger=trigger)), effect(clean))
        for trigger, effect in _pairs(acted)
    )
