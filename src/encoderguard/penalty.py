"""The weight of a mask's size in a trigger search: one lambda per restart, moved by success and failure."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LambdaController", "LambdaRule"]


@dataclass(frozen=True, kw_only=True)
class LambdaRule:
    """How lambda follows success and failure: DECREE's code, and Neural Cleanse before it."""

    initial: float = 1e-3
    factor: float = 5.0
    """Multiplies after more than ``patience`` successes in a row, divides after as many failures."""
    patience: int = 5
    lowest: float = 1e-5
    """Division stops below this."""
    highest: float = 1e5
    reset_after: int = 10
    """More successes in a row than this below ``lowest`` set lambda back to ``initial``."""


class LambdaController:
    """One lambda per restart, all following the same rule."""

    def __init__(self, rule: LambdaRule, restarts: int) -> None:
        self.rule = rule
        self.value = torch.full((restarts,), rule.initial, dtype=torch.float64)
        self.up, self.down, self.low = (torch.zeros(restarts, dtype=torch.int64) for _ in range(3))

    def update(self, which: Tensor, success: Tensor) -> None:
        """Count one step of the restarts ``which`` (indices) and move their lambdas."""
        rule, value = self.rule, self.value[which]
        up = torch.where(success, self.up[which] + 1, 0)
        down = torch.where(success, 0, self.down[which] + 1)
        low = torch.where(success & (value < rule.lowest), self.low[which] + 1, 0)
        raised, lowered, reset = up > rule.patience, down > rule.patience, low > rule.reset_after
        value = torch.where(raised & (value < rule.highest), value * rule.factor, value)
        value = torch.where(lowered & (value >= rule.lowest), value / rule.factor, value)
        self.value[which] = torch.where(reset, rule.initial, value)
        self.up[which], self.down[which] = up.masked_fill(raised, 0), down.masked_fill(lowered, 0)
        self.low[which] = low.masked_fill(reset, 0)
