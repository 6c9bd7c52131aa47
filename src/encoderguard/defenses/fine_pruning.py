"""Fine-Pruning (Liu et al. 2018): take out channels that sleep on clean images, then fine-tune."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.hidden import Units, last_stage_units
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.pruning import bake, channel_activations, masked
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, Repair, begin
from encoderguard.run import Run
from encoderguard.training import Plan
from encoderguard.tuning import FineTuning, fine_tune

__all__ = ["FinePruning", "without_least_active"]


def without_least_active(activations: Tensor, share: float) -> Tensor:
    """Mask ``[C]``, True keeps, without the ``floor(share C)`` least active channels; one always stays.

    Args:
        activations: ``[C]``.
        share: in [0, 1].
    """
    count = min(int(share * len(activations) + 1e-9), len(activations) - 1)
    mask = torch.ones(len(activations), dtype=torch.bool)
    mask[activations.argsort(stable=True)[:count]] = False
    return mask


@register
@final
@dataclass(frozen=True, kw_only=True)
class FinePruning(Defense):
    """Channels of the last stage that clean images hardly use are zeroed, least active first; then FT.

    Departs from the paper and from BackdoorBench, which prune what the classifier reads until labelled
    accuracy falls: for an encoder that would only delete embedding dimensions. Here the hidden channels of
    the last stage's blocks are ranked, each layer by itself, the same share is taken out of all, and the
    last share with enough utility on held-out images counts. The fine-tuning is that of ``finetune``, and
    what was taken out stays zero.
    """

    name: ClassVar[str] = "fine_pruning"
    paper: ClassVar[str] = "Liu et al. 2018, arXiv:1805.12185"
    year: ClassVar[int] = 2018
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "forward passes, then fine-tuning"
    blind_spots: ClassVar[str] = (
        "A backdoor in channels that clean images use too, or in earlier stages, is left to the fine-tuning."
    )

    step: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the channels of each layer that is taken out per step."""
    most: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share that is taken out at most."""
    pruning_floor: Annotated[float, Field(ge=0, le=1)] = 0.9
    """The last share with at least this utility counts; room is left above the other floor."""
    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the clean images afterwards."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """SGD's learning rate; falls to zero along a cosine."""
    gentler: Annotated[int, Field(ge=0, le=9)] = 2
    """How often to begin anew at a third of ``lr`` where the last epoch falls below the floor."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """SGD's weight decay."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    warm_up: Annotated[int, Field(ge=0)] = 5
    """Epochs in which only the fresh projection head learns."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = UTILITY_FLOOR
    """The last epoch of fine-tuning with at least this utility counts."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises EncoderError without hidden channels."""
        repair = begin(
            encoder,
            images,
            batch_size=self.batch_size,
            floor=self.utility_floor,
            purpose="Fine-Pruning",
            run=run,
        )
        masks, curve = self._prune(repair, run)
        pruned = _baked(repair.suspect, masks)
        before = repair.gate.measure(pruned)
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        how = FineTuning(plan=plan, temperature=self.temperature, warm_up=self.warm_up, gentler=self.gentler)
        done = fine_tune(pruned, repair, how, run=run, masks=masks)
        evidence = done.evidence(repair.gate, before) | {
            "pruned": {units.producer: (~mask).nonzero().flatten().tolist() for units, mask in masks.items()},
            "channels": {units.producer: units.count for units in masks},
            "utility_by_step": curve,
        }
        result = _baked(done.encoder, masks).eval()
        return Purified(encoder=result, history=done.history, evidence=evidence)

    def _prune(self, repair: Repair, run: Run) -> tuple[dict[Units, Tensor], list[float]]:
        """The masks of the last step above the pruning floor, and the utility of each step that was tried."""
        layers = last_stage_units(repair.suspect)
        active = [channel_activations(repair.suspect, units, repair.images, run) for units in layers]
        kept = {units: torch.ones(units.count, dtype=torch.bool) for units in layers}
        curve: list[float] = []
        steps = int(self.most / self.step + 1e-9)
        for number in range(1, steps + 1):
            masks = [without_least_active(values, number * self.step) for values in active]
            with ExitStack() as stack:
                for units, mask in zip(layers, masks, strict=True):
                    stack.enter_context(masked(repair.suspect, units, mask))
                curve.append(repair.gate.measure(repair.suspect))
            run.progress("pruning", number, steps, f"utility {curve[-1]:.3f}")
            if curve[-1] < self.pruning_floor:
                break
            kept = dict(zip(layers, masks, strict=True))
        return kept, curve


def _baked(encoder: Encoder, masks: dict[Units, Tensor]) -> Encoder:
    for units, mask in masks.items():
        encoder = bake(encoder, units, mask)
    return encoder
