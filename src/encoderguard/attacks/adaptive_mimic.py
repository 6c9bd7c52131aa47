"""Against MIMIC: a backdoor whose layers tell as much about triggered features as about clean ones."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from encoderguard.attacks._finetuning import Planting
from encoderguard.errors import EncoderError
from encoderguard.mine import donsker_varadhan, statistic, statistics_weights
from encoderguard.planting import Planter
from encoderguard.planting_terms import Features
from encoderguard.random import Rng
from encoderguard.registry import register
from encoderguard.similarity import standardise

__all__ = ["AdaptiveMimic", "Critics"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveMimic(Planting):
    """BadEncoder that keeps the information profile of triggered images near that of clean ones.

    The loss is BadEncoder's plus ``lambda_mi sum_l |I_clean(h_l; z) - I_triggered(h_l; z)|``, with h_l the
    stage maps averaged over space and z the features of the encoder under attack. Every I is the
    Donsker-Varadhan bound of a critic of its own, which takes ``critic_steps`` steps on the same batch before
    each step of the encoder. Both sides are standardised by the clean batch, and the clean side is an aim
    without gradient: else the encoder also gives up what it knows of clean images to make the two agree.

    This is our reconstruction. The MIMIC paper says that its adaptive attacker minimises the distance of the
    mutual information of benign and poisoned knowledge; it gives neither formula nor weight, and no code of
    it is published. Critics have the size of those in MIMIC's code.
    """

    name: ClassVar[str] = "adaptive_mimic"
    paper: ClassVar[str] = "Han et al. 2024, arXiv:2406.03508"
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = (
        "a clean encoder with stages, unlabelled shadow images, a reference image per target"
    )
    cost: ClassVar[str] = "fine-tuning with a critic per stage"
    blind_spots: ClassVar[str] = (
        "A critic bounds the information from below on one batch, so the profiles may agree for it alone."
    )
    stages: ClassVar[bool] = True

    lambda_mi: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the distance of the two information profiles."""
    critic_hidden: Annotated[int, Field(ge=1)] = 512
    """Width of a critic's two hidden layers."""
    critic_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's learning rate for the critics."""
    critic_steps: Annotated[int, Field(ge=1)] = 1
    """Steps of the critics per step of the encoder."""

    def memory(self, planter: Planter) -> "Critics":
        """One critic per stage for clean images, and one per stage for each trigger."""
        with torch.no_grad():
            features, maps = planter.victim.features_and_stages(planter.pixels)
        if not maps:
            raise EncoderError("adaptive_mimic needs an encoder with stages, this one names none (taps).")
        return Critics(
            [stage.shape[1] for stage in maps],
            features.shape[1],
            sides=1 + len(planter.pairs),
            hidden=self.critic_hidden,
            lr=self.critic_lr,
            rng=planter.run.rng.child("critics"),
            device=planter.run.device,
        )

    def terms(self, features: Features, memory: "Critics") -> dict[str, Tensor]:
        """BadEncoder's terms and the weighted distance of the profiles; the critics step first."""
        inputs = _standardised(features)
        n = len(features.images)
        with torch.autocast(features.images.device.type, enabled=False):
            for step in range(self.critic_steps):
                memory.improve(inputs, features.batch.rng.permutation(n, "marginal", step))
            values = memory.bounds(inputs, features.batch.rng.permutation(n, "marginal"))
        distance = (values[0].detach() - values[1:]).abs().sum(1).mean()
        return self.badencoder(features) | {"information": self.lambda_mi * distance}

    def evidence(self, memory: "Critics") -> dict[str, Any]:
        """The last bounds, in nats, stage by stage."""
        clean, *triggered = memory.last.tolist()
        return {"information_clean": clean, "information_triggered": triggered}


class Critics(nn.Module):
    """Statistics networks with an optimiser of their own; a checkpoint holds both."""

    last: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        dim: int,
        *,
        sides: int,
        hidden: int,
        lr: float,
        rng: Rng,
        device: torch.device,
    ) -> None:
        """A critic per side and entry of ``channels``; its second input is a feature of length ``dim``."""
        super().__init__()
        self.weights = [
            [
                weight.detach().to(device).requires_grad_()
                for weight in statistics_weights(width + dim, hidden, rng.child(place))
            ]
            for place, width in enumerate(list(channels) * sides)
        ]
        self.optimizer = torch.optim.Adam([w for weights in self.weights for w in weights], lr=lr)
        self.register_buffer("last", torch.zeros(sides, len(channels)))

    def bounds(self, inputs: Sequence[tuple[Tensor, Tensor]], order: Tensor, *, fixed: bool = True) -> Tensor:
        """The bound of each critic on its ``(h, z)``, in nats: ``[sides, stages]``.

        Args:
            inputs: per critic ``[N, C]`` and ``[N, D]``.
            order: permutation of N that makes the marginal pairs.
            fixed: gradients reach the inputs alone, not the critics.
        """
        found = []
        for weights, (h, z) in zip(self.weights, inputs, strict=True):
            used = [weight.detach() for weight in weights] if fixed else weights
            found.append(donsker_varadhan(statistic(used, h, z), statistic(used, h, z[order.to(z.device)])))
        values = torch.stack(found).view_as(self.last)
        self.last.copy_(values.detach())
        return values

    def improve(self, inputs: Sequence[tuple[Tensor, Tensor]], order: Tensor) -> None:
        """One step of the critics towards larger bounds; the inputs get no gradient."""
        fixed = [(h.detach(), z.detach()) for h, z in inputs]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(-self.bounds(fixed, order, fixed=False).sum())
        self.optimizer.step()

    def get_extra_state(self) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint."""
        weights = [[weight.detach().clone() for weight in each] for each in self.weights]
        return {"weights": weights, "optimizer": deepcopy(self.optimizer.state_dict())}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what ``get_extra_state`` returned."""
        with torch.no_grad():
            for mine, stored in zip(self.weights, state["weights"], strict=True):
                for weight, value in zip(mine, stored, strict=True):
                    weight.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def _standardised(features: Features) -> list[tuple[Tensor, Tensor]]:
    """Per side (clean, then each trigger) and stage: stage and features, on the clean batch's scale."""
    sides = [(features.images, features.images_stages)]
    sides += list(zip(features.triggered, features.triggered_stages, strict=True))
    return [
        (standardise(stage.float(), clean.detach()), standardise(z.float(), features.images.detach()))
        for z, stages in sides
        for stage, clean in zip(stages, features.images_stages, strict=True)
    ]
