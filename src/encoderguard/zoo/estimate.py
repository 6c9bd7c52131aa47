"""What a cell costs, before anything runs: floating-point operations, and hours at a given speed."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from encoderguard.encoder import Encoder
from encoderguard.loading import spec_for
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.zoo.recipe import Cell, Task

__all__ = ["CORE_SPEED", "cost", "forward_cost"]

CORE_SPEED = 5e10
"""Operations per second that one processor core does in training, roughly."""
_COUNT = 50_000  # images of a set of unknown size
_PROBED = 20_000  # images that an evaluation looks at, roughly
_TRAINING = 3  # forward and backward pass, in forward passes


def cost(cell: Cell) -> float:
    """Floating-point operations of training and judging a cell, roughly.

    Pre-training sees each image in two views. An attack trains on each image with and without the trigger,
    and looks at the clean encoder's features once.
    """
    one, images = forward_cost(cell.task), cell.task.count or _COUNT
    tunes = cell.attack is not None and not cell.poisons_data
    family, name = ("attack", cell.attack) if tunes else ("pretrain", cell.pretrain)
    given = cell.settings if tunes else cell.pretrain_settings
    epochs = create(family, str(name), given).settings().get("epochs", 1)  # type: ignore[arg-type]
    judging = _PROBED * (1 if cell.attack is None else 4)
    return float(one * (images * epochs * 2 * _TRAINING + judging))


def forward_cost(task: Task) -> float:
    """Floating-point operations of one image's forward pass."""
    return _forward(task.architecture, task.width, task.stem, task.image_size or 32)


@lru_cache(maxsize=32)
def _forward(architecture: str, width: int, stem: str, size: int) -> float:
    encoder = Encoder.build(spec_for(architecture, width=width, stem=stem), Rng(0)).eval()  # type: ignore[arg-type]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.full((1, 3, size, size), 0.5))
    return float(counter.get_total_flops())
