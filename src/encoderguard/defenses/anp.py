"""ANP (Wu and Wang 2021): channels whose perturbation brings the backdoor out are taken out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError
from encoderguard.hidden import hidden_units
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.methods import Defense, History, Purified
from encoderguard.registry import register
from encoderguard.repair import PRUNING_FLOOR, Repair, begin
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["ANP", "Gain", "ascended", "gains", "largest_threshold", "scaled", "without"]


@dataclass(frozen=True)
class Gain:
    """One layer's scale and shift per channel; the names are those of ``encoder.named_parameters()``."""

    weight: str
    """First dimension: C channels."""
    bias: str | None
    count: int
    """C."""


def gains(encoder: Encoder) -> list[Gain]:
    """Where masks sit, shallow to deep: every BatchNorm; without any, every layer of hidden units.

    Of hidden units it is the normalisation behind the convolution or linear layer that makes them, or that
    layer itself.

    Raises:
        EncoderError: there is neither.
    """
    modules = dict(encoder.backbone.named_modules())
    names = [name for name, part in modules.items() if isinstance(part, _BatchNorm) and part.affine]
    names = names or [units.norm or units.producer for units in hidden_units(encoder)]
    if not names:
        raise EncoderError(
            f"The encoder ({encoder.spec.architecture}) has neither BatchNorm with a scale nor hidden "
            "channels, so ANP has nothing to mask; choose another method."
        )
    return [_gain(name, modules[name]) for name in names]


def _gain(name: str, part: Any) -> Gain:
    bias = None if part.bias is None else f"backbone.{name}.bias"
    return Gain(f"backbone.{name}.weight", bias, len(part.weight))


def scaled(encoder: Encoder, layers: Sequence[Gain], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Parameters by name with weights times ``scale`` and biases times ``shift``, both ``[sum of C]``."""
    own, found, first = dict(encoder.named_parameters()), dict[str, Tensor](), 0
    for layer in layers:
        place, weight = slice(first, first + layer.count), own[layer.weight]
        found[layer.weight] = weight * scale[place].view(-1, *[1] * (weight.ndim - 1))
        if layer.bias is not None:
            found[layer.bias] = own[layer.bias] * shift[place]
        first += layer.count
    return found


def ascended(noise: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """One step of size ``epsilon`` up the sign of the gradient, then back into ``[-epsilon, epsilon]``."""
    return (noise + epsilon * gradient.sign()).clamp(-epsilon, epsilon)


def without(encoder: Encoder, layers: Sequence[Gain], keep: Tensor) -> Encoder:
    """A copy whose weights hold the mask ``keep``, bool ``[sum of C]``; biases stay, as in training."""
    copy = encoder.clone()
    ones = torch.ones(len(keep), device=keep.device)
    with torch.no_grad():
        for name, value in scaled(copy, layers, keep.to(ones), ones).items():
            copy.get_parameter(name).copy_(value)
    return copy


def largest_threshold(thresholds: Sequence[float], utilities: Sequence[float], floor: float) -> float | None:
    """The largest threshold whose utility is at least ``floor``; None if there is none."""
    return max((t for t, u in zip(thresholds, utilities, strict=True) if u >= floor), default=None)


class _Masks(nn.Module):
    """``m``, ``[sum of C]`` in [0, 1]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(count))

    @torch.no_grad()
    def clip(self, step: int, total: int) -> None:
        self.values.clamp_(0, 1)


@register
@final
@dataclass(frozen=True, kw_only=True)
class ANP(Defense):
    """Masks on channels learn to keep the features where scales and shifts are perturbed for the worst.

    Departs from the paper in the loss: the cosine distance to the suspect's own features of the same clean
    image stands for the cross-entropy, so that the random start of the perturbation gives the first
    gradient. The perturbation stays within epsilon, as printed and unlike the code; BatchNorm keeps its
    statistics; the threshold is the largest with enough utility, where BackdoorBench's code picks by attack
    success. Networks without BatchNorm have their masks on hidden units.
    """

    name: ClassVar[str] = "anp"
    paper: ClassVar[str] = "Wu and Wang 2021, arXiv:2110.14430"
    year: ClassVar[int] = 2021
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "three forward and two backward passes per step"
    blind_spots: ClassVar[str] = (
        "A backdoor in channels that clean features need, or one that no perturbation of channels brings out."
    )

    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Largest relative perturbation of a scale or shift."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Weight of the unperturbed loss; the perturbed one has the rest."""
    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps of the masks; rounded up to whole passes over the images."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step."""
    lr: Annotated[float, Field(gt=0)] = 0.2
    """SGD's learning rate of the masks."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    threshold_step: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Distance of two thresholds that are tried, from 0 on."""
    most: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The largest threshold that is tried."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = PRUNING_FLOOR
    """The largest threshold with at least this utility counts."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense. Raises EncoderError without BatchNorm and without hidden channels."""
        repair = begin(
            encoder, images, batch_size=self.batch_size, floor=self.utility_floor, purpose="ANP", run=run
        )
        layers = gains(repair.suspect)
        masks, history = self._learn(repair, layers, run)
        thresholds = self._thresholds()
        utilities = []
        for number, threshold in enumerate(thresholds, start=1):
            run.check_stop()
            utilities.append(repair.gate.measure(without(repair.suspect, layers, masks > threshold)))
            run.progress("thresholds", number, len(thresholds), f"utility {utilities[-1]:.3f}")
        chosen = largest_threshold(thresholds, utilities, self.utility_floor)
        keep = masks > (-1 if chosen is None else chosen)
        return Purified(
            encoder=without(repair.suspect, layers, keep).eval().requires_grad_(True),
            history=history,
            evidence={
                "threshold": chosen,
                "thresholds": thresholds,
                "utilities": utilities,
                "pruned": _pruned(layers, keep),
                "channels": {layer.weight: layer.count for layer in layers},
                "utility_after": 1.0 if chosen is None else utilities[thresholds.index(chosen)],
                "utility_floor": self.utility_floor,
                "held_out": repair.gate.count,
                "fallback": self._fallback(keep, utilities),
            },
        )

    def _thresholds(self) -> list[float]:
        count = int(self.most / self.threshold_step + 1e-9)
        return [round(number * self.threshold_step, 6) for number in range(count + 1)]

    def _fallback(self, keep: Tensor, utilities: list[float]) -> str | None:
        if not bool(keep.all()):
            return None
        if max(utilities) < self.utility_floor:
            why = f"every threshold takes the utility below the floor of {self.utility_floor:g}"
        else:
            why = "no mask fell to a threshold that leaves enough utility"
        return f"ANP took no channel out: {why}; the encoder is returned as it was."

    def _learn(self, repair: Repair, layers: list[Gain], run: Run) -> tuple[Tensor, History]:
        masks = _Masks(sum(layer.count for layer in layers)).to(run.device)
        suspect = repair.suspect
        plan = Plan(
            epochs=math.ceil(self.steps / (len(repair.images) // self.batch_size)),
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="sgd",
            momentum=self.momentum,
        )

        def distance(images: Tensor, aim: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            parameters = scaled(suspect, layers, scale, shift)
            return cosine_distance(torch.func.functional_call(suspect, parameters, (images,)), aim)

        def loss(batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                aim = suspect(batch.images)
            start = torch.rand(2, len(masks.values), generator=batch.rng.generator("noise")) * 2 - 1
            noise = (self.epsilon * start).to(aim.device).requires_grad_(True)
            worse = distance(batch.images, aim, masks.values.detach() + noise[0], 1 + noise[1])
            (gradient,) = torch.autograd.grad(worse, noise)
            noise = ascended(noise.detach(), gradient, self.epsilon)
            clean = distance(batch.images, aim, masks.values, torch.ones_like(noise[1]))
            dirty = distance(batch.images, aim, masks.values + noise[0], 1 + noise[1])
            return {"clean": self.alpha * clean, "perturbed": (1 - self.alpha) * dirty}

        history = train(
            masks, loss, repair.images, plan=plan, run=run, task="learning masks", after_step=masks.clip
        )
        return masks.values.detach(), history


def _pruned(layers: Sequence[Gain], keep: Tensor) -> dict[str, list[int]]:
    parts = torch.split(keep.cpu(), [layer.count for layer in layers])
    return {
        layer.weight: (~part).nonzero().flatten().tolist() for layer, part in zip(layers, parts, strict=True)
    }
