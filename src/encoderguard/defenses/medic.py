"""MEDIC (Xu et al. 2023): clone what matters of every layer into an empty student."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.encoder import Encoder
from encoderguard.hooks import captured
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, Purified
from encoderguard.registry import register
from encoderguard.repair import Contrast, Repair, begin
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["MEDIC", "cloning_loss", "importance", "strength"]

_FLOOR = 0.1  # no channel is scaled by less than this share of the layer's root mean square deviation


def strength(values: Tensor) -> Tensor:
    """Mean absolute value of each channel over the places, divided by the sample's largest.

    Args:
        values: ``[N, C, H, W]``, activations or gradients.

    Returns:
        ``[N, C]`` in [0, 1]; a sample that is zero everywhere gives zeros.
    """
    mean = values.float().abs().mean((2, 3))
    return mean / mean.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def importance(activation: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """``sqrt(softmax(T a) softmax(T g))`` over channels, for ``a`` and ``g`` of shape ``[N, C]``."""
    return ((temperature * activation).softmax(1) * (temperature * gradient).softmax(1)).sqrt()


def cloning_loss(student: Tensor, teacher: Tensor, weight: Tensor, deviation: Tensor) -> Tensor:
    """``mean_n sum_c w_nc mean_places ((s - t) / sigma_c)^2``.

    Args:
        student: ``[N, C, H, W]``.
        teacher: ``[N, C, H, W]``.
        weight: ``[N, C]``.
        deviation: sigma, ``[C]``.
    """
    scaled = (student.float() - teacher.float()) / deviation.view(-1, 1, 1)
    return (weight * scaled.square().mean((2, 3))).sum(1).mean()


@register
@final
@dataclass(frozen=True, kw_only=True)
class MEDIC(Defense):
    """A student from random weights copies the layers of the suspect, channels weighted by their importance.

    Loss: ``L_task + cloning sum_l L_l``, with L_l as in ``cloning_loss`` on the output of each BatchNorm, and
    importance from the size of the suspect's activation and of the gradient of the task there. Departs
    from the paper and its code in the task, NT-Xent instead of cross-entropy, for the suspect behind a head
    that is fitted first (the student's own loss has no gradient at the suspect's activations); in scaling
    activations and gradients to at most 1 per sample before the softmax, whose T would else depend on the
    units of a loss; and in hooks that live for one forward pass. Networks without BatchNorm are cloned at
    their taps. The utility is reported, but nothing is done about it: there is no earlier encoder to
    go back to but the suspect.
    """

    name: ClassVar[str] = "medic"
    paper: ClassVar[str] = "Xu et al. 2023, CVPR"
    year: ClassVar[int] = 2023
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a short training, with a backward pass of the suspect at each step"
    blind_spots: ClassVar[str] = (
        "Channels that serve clean images and the backdoor alike are cloned; few images cost accuracy."
    )

    epochs: Annotated[int, Field(ge=1)] = 60
    """Passes over the clean images."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step; each gives two views."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """Adam's learning rate; falls to zero along a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Adam's weight decay."""
    cloning: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the cloning terms (lambda)."""
    sharpness: Annotated[float, Field(ge=0)] = 5.0
    """T of the importance; 0 weighs all channels alike."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    warm_up: Annotated[int, Field(ge=0)] = 5
    """Epochs in which the suspect's projection head is fitted."""

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense."""
        repair = begin(encoder, images, batch_size=self.batch_size, floor=0.0, purpose="MEDIC", run=run)
        teacher = repair.suspect.clone().requires_grad_(True)  # for gradients at its activations
        judge = Contrast(teacher, run.child("teacher"), temperature=self.temperature)
        if self.warm_up:
            plan = Plan(epochs=self.warm_up, batch_size=self.batch_size, lr=1e-3)
            judge.warm_up(teacher, repair.images, plan=plan, run=run.child("teacher"))
        student = repair.suspect.fresh(run.rng.child("student")).to(run.device)
        task = Contrast(student, run, temperature=self.temperature)
        deviations = _deviations(teacher, repair.images, run)

        def loss(batch: Batch) -> dict[str, Tensor]:
            views = torch.cat(batch.views(SIMCLR))
            aims, weights = self._important(teacher, judge, views)
            features, outputs = _outputs(student, views)
            terms = [
                cloning_loss(own, aim, weight, sigma)
                for own, aim, weight, sigma in zip(
                    _maps(student, outputs), aims, weights, deviations, strict=True
                )
            ]
            return {
                "nt_xent": task.of_features(features),
                "cloning": self.cloning * torch.stack(terms).sum(),
            }

        history = train(
            nn.ModuleDict({"student": student, "task": task}),
            loss,
            repair.images,
            plan=self._plan(),
            run=run,
            task="cloning",
            monitor=lambda epoch: {"utility": repair.gate.measure(student)},
        )
        evidence = _evidence(student, repair, self.epochs) | {"cloned_layers": len(deviations)}
        return Purified(encoder=student.eval(), history=history, evidence=evidence)

    def _important(
        self, teacher: Encoder, judge: Contrast, views: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The suspect's maps, and the importance of their channels."""
        with torch.enable_grad():
            features, outputs = _outputs(teacher, views)
            slopes = _maps(teacher, torch.autograd.grad(judge.of_features(features), outputs))
        maps = [own.detach() for own in _maps(teacher, outputs)]
        weights = [
            importance(strength(own), strength(slope), self.sharpness)
            for own, slope in zip(maps, slopes, strict=True)
        ]
        return maps, weights

    def _plan(self) -> Plan:
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )


def _places(encoder: Encoder) -> list[str]:
    """Where is cloned: all BatchNorms, else the taps."""
    parts = encoder.backbone.named_modules()
    return [name for name, part in parts if isinstance(part, nn.BatchNorm2d)] or list(encoder.spec.taps)


def _outputs(encoder: Encoder, views: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features, and the outputs of these places as the network makes them."""
    places = _places(encoder)
    with captured(encoder.backbone, places) as outputs:
        features = encoder(views)
    return features, [outputs[name] for name in places]


def _maps(encoder: Encoder, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same as ``[N, C, H, W]``; of tokens ``[N, T, C]`` as ``[N, C, T, 1]``."""
    last = encoder.spec.tap_layout == "NHWC" and _places(encoder) == list(encoder.spec.taps)
    return [
        values.movedim(-1, 1).unsqueeze(-1)
        if values.ndim == 3
        else (values.movedim(-1, 1) if last else values)
        for values in outputs
    ]


def _deviations(teacher: Encoder, images: ImageSet, run: Run) -> list[Tensor]:
    """Standard deviation of each channel of what is cloned, over one view of each image and all places."""
    generator = run.rng.generator("deviations")
    sums: list[Tensor] = []  # of each layer: [2, C], of x and of x squared
    places: list[int] = []
    for batch in images.float_batches(256):
        run.check_stop()
        with torch.no_grad(), run.autocast():
            _, outputs = _outputs(teacher, SIMCLR(batch.to(run.device), generator))
        rows = [values.movedim(1, -1).flatten(0, -2).float() for values in _maps(teacher, outputs)]
        found = [torch.stack([values.sum(0), values.square().sum(0)]).cpu().double() for values in rows]
        sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
        places = [old + len(new) for old, new in zip(places or [0] * len(rows), rows, strict=True)]
    return [_deviation(total / count).to(run.device) for total, count in zip(sums, places, strict=True)]


def _deviation(moments: Tensor) -> Tensor:
    """From ``[2, C]``, the means of x and of x squared; floored, so that no silent channel outweighs all."""
    variance = (moments[1] - moments[0].square()).clamp_min(0)
    least = _FLOOR * variance.mean().sqrt()
    return torch.maximum(variance.sqrt(), least).clamp_min(torch.finfo(torch.float32).tiny).float()


def _evidence(student: Encoder, repair: Repair, epochs: int) -> dict[str, Any]:
    return {
        "utility_after": repair.gate.measure(student),
        "held_out": repair.gate.count,
        "epochs_used": epochs,
    }
