"""How long and how fast to train: epochs, optimiser, learning rate over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["Plan", "Schedule", "optimizer_for"]

Schedule = Literal["constant", "cosine", "one_cycle", "warmup_cosine"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast to train."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Schedule = "constant"
    """``cosine`` falls to zero; ``one_cycle`` warms up linearly over the first tenth, then does;
    ``warmup_cosine`` warms up over ``warmup_epochs``."""
    warmup_epochs: int = field(default=0, repr=False)  # told by `text`, where it counts

    @property
    def text(self) -> str:
        """The plan in words: what a checkpoint is compared by."""
        warm = f", warmup_epochs={self.warmup_epochs}" if self.schedule == "warmup_cosine" else ""
        return repr(self) + warm

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step."""
        if self.schedule == "constant":
            return self.lr
        warm = 0
        if self.schedule == "one_cycle":
            warm = max(1, total // 10)
        elif self.schedule == "warmup_cosine":
            warm = total * min(self.warmup_epochs, self.epochs) // self.epochs
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def optimizer_for(model: nn.Module, plan: Plan, fixed: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The plan's optimiser over the trainable parameters; those of ``fixed`` form a second group."""
    apart = {id(parameter) for parameter in fixed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [each for each in trained if id(each) not in apart]}]
    if fixed:
        groups.append({"params": list(fixed)})
    if plan.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True
        )
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
