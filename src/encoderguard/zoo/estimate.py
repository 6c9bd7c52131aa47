"""What a cell costs, before anything runs: floating-point operations, and hours at a given speed."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from encoderguard.encoder import Encoder
from encoderguard.loading import spec_for
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.zoo.identity import finished
from encoderguard.zoo.pictures import Pictures
from encoderguard.zoo.recipe import Cell, Task, ZooRecipe

__all__ = ["CORE_SPEED", "cost", "forward_cost", "needed_sets", "plan_lines"]

CORE_SPEED = 5e10
"""Operations per second that one processor core does in training, roughly."""
_COUNT = 50_000  # images of a set of unknown size
_DIGITS = 1_200  # of the embedded one
_PROBED = 20_000  # images that an evaluation looks at, roughly
_TRAINING = 3  # forward and backward pass, in forward passes


def cost(cell: Cell) -> float:
    """Floating-point operations of training and judging a cell, roughly.

    Pre-training sees each image in two views. An attack trains on each image with and without the trigger,
    and looks at the clean encoder's features once.
    """
    whole = _DIGITS if cell.task.images.partition(":")[0] == "digits" else _COUNT
    one, images = forward_cost(cell.task), cell.task.count or whole
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


def plan_lines(recipe: ZooRecipe, pictures: Pictures, build: Path) -> Iterator[str]:
    """A line per cell with what it is and costs, the sum, and what cannot be opened here."""
    cells, total = recipe.cells(), 0.0
    for cell in cells:
        flops = cost(cell)
        total += flops
        yield f"{cell.name}: {_what(cell)}, {_priced(flops)}{_state(build / cell.name / 'encoder')}"
    yield f"{len(cells)} encoders: {_priced(total)}"
    yield from (f"Missing: {problem}" for problem in pictures.missing(needed_sets(cells)))


def _state(folder: Path) -> str:
    if finished(folder):
        return ", trained already"
    return ", begun" if folder.exists() else ""


def needed_sets(cells: list[Cell]) -> list[tuple[str, int | None, bool]]:
    """Spec, size and whether labels are needed, of every image set of these cells."""
    found: dict[tuple[str, int | None, bool], None] = {}
    for cell in cells:
        task = cell.task
        labels = cell.poisons_data or bool(create("pretrain", cell.pretrain).needs_labels)
        found[task.images, task.image_size, labels] = None
        for spec in (task.downstream_train, task.downstream_test):
            found[spec, task.image_size, True] = None
    return list(found)


def _what(cell: Cell) -> str:
    task = cell.task
    trained = f"{cell.pretrain} on {task.images}" if cell.attack is None or cell.poisons_data else ""
    attacked = "" if cell.attack is None else f"{cell.attack} to {task.downstream_train} class {cell.target}"
    name = task.architecture if ":" in task.architecture else f"{task.architecture} width {task.width}"
    return f"{name}, " + " with ".join(filter(None, [trained, attacked]))


def _priced(flops: float) -> str:
    return f"{flops / 1e15:.3g} PFLOP, about {flops / CORE_SPEED / 3600:,.1f} h on one core"
