"""The sizes and lengths of the main job, from digits in minutes to the papers' own setting."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from encoderguard.backbones import Stem
from encoderguard.errors import SettingError

__all__ = ["RECIPES", "Recipe", "recipe_named"]


class Recipe(BaseModel):
    """Every choice of the main job but its seed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    images: str
    """Pre-training set; shadow set, scanned and clean images are drawn from it too."""
    downstream_train: str
    downstream_test: str
    target: int
    """The class that the attacker aims at."""
    architecture: str = "resnet18"
    width: int
    stem: Stem = "cifar"
    normalisation: str | None = None
    image_size: int | None = None
    pretrain_count: int | None = None
    """Images to pre-train on; None takes all."""
    pretrain: dict[str, Any]
    shadow_count: int | None = None
    attack: dict[str, Any]
    scan_count: int
    scan: dict[str, Any] = {}
    purify_count: int
    purify: dict[str, Any] = {}
    probe: str = "mlp"
    probe_settings: dict[str, Any] = {}


_DIGITS = Recipe(
    name="digits",
    images="digits:train",
    downstream_train="digits:train",
    downstream_test="digits:test",
    target=0,
    width=8,
    pretrain={"epochs": 40, "batch_size": 128, "lr": 2e-3, "schedule": "one_cycle"},
    attack={"epochs": 20, "batch_size": 128, "optimizer": "adam", "lr": 3e-4, "trigger_size": 8},
    scan_count=300,
    purify_count=300,
    purify={"batch_size": 100, "epochs": 100},
    probe="linear",
)
_CIFAR10 = Recipe(
    name="cifar10",
    images="cifar10:train",
    downstream_train="gtsrb:train",
    downstream_test="gtsrb:test",
    target=12,
    width=16,
    normalisation="cifar10",
    image_size=32,
    pretrain={"epochs": 20, "lr": 2e-3, "schedule": "one_cycle"},
    shadow_count=10_000,
    attack={"epochs": 8, "optimizer": "adam", "lr": 3e-4},
    scan_count=1000,
    purify_count=2000,
    purify={"epochs": 50},
    probe="linear",
)
_PAPER = Recipe(
    name="paper",
    images="cifar10:train",
    downstream_train="gtsrb:train",
    downstream_test="gtsrb:test",
    target=12,
    width=64,
    normalisation="cifar10",
    image_size=32,
    pretrain={"epochs": 1000},
    attack={},
    scan_count=1000,
    purify_count=2000,
    purify={"mode": "default"},
    probe="mlp",
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_DIGITS, _CIFAR10, _PAPER)}
"""``digits``: minutes on two cores, no download. ``cifar10``: ResNet-18 width 16, about an hour on two cores.
``paper``: ResNet-18 and the papers' lengths, for an accelerator."""


def recipe_named(name: str, **changes: Any) -> Recipe:
    """The recipe of that name with some fields replaced; None leaves a field.

    Raises:
        SettingError: no such recipe, or an impossible value.
    """
    if name not in RECIPES:
        raise SettingError(f"Unknown recipe '{name}'; expected one of: {', '.join(RECIPES)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    return Recipe.model_validate(RECIPES[name].model_dump() | given)
