"""A zoo's recipe: a TOML file of shared choices and compact grids, and the cells that it stands for."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from encoderguard.backbones import Stem
from encoderguard.errors import SettingError
from encoderguard.loading import spec_for
from encoderguard.methods import DataPoisoning
from encoderguard.probes import make_probe
from encoderguard.registry import create, method_class

__all__ = ["AttackGroup", "Cell", "CleanGroup", "Task", "ZooRecipe", "read_recipe"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Seeds = Annotated[list[int], Field(min_length=1)]
Count = Annotated[
    Annotated[int, Field(ge=1)] | None, BeforeValidator(lambda given: None if given == "all" else given)
]
_OF_THE_CLEAN = ("architecture", "width", "stem", "normalisation", "image_size", "precision")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Task(_Part):
    """What a cell is trained on and judged by; a group may replace each of the recipe's defaults."""

    images: str = "digits:train"
    """Pre-training set; of an attack, the shadow set."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels to which images are brought; null takes them as they are."""
    architecture: str = "resnet18"
    """As ``encoderguard pretrain --arch`` takes it."""
    width: Annotated[int, Field(ge=1)] = 64
    stem: Stem = "cifar"
    normalisation: str | None = None
    precision: Literal["float32", "bf16"] = "float32"
    count: Count = None
    """Images to draw with the cell's seed; "all", or null, takes all."""
    downstream_train: str = "digits:train"
    """Labelled images for the probes, and the attacker's candidates for a reference."""
    downstream_test: str = "digits:test"
    probe: str = "linear"
    probe_settings: dict[str, Any] = {}
    probe_seeds: Annotated[int, Field(ge=1)] = 1


class CleanGroup(Task):
    """Clean encoders: one per seed."""

    name: Name
    method: str = "simclr"
    """Pre-training method."""
    settings: dict[str, Any] = {}
    seeds: Seeds = [0]


class AttackGroup(Task):
    """Backdoored encoders: one per trigger, target and seed."""

    name: Name
    method: str | None = None
    """Attack; by default the one of the group's name."""
    clean: str
    """Group of clean encoders, of which the one of the same seed is taken; or one cell of it."""
    settings: dict[str, Any] = {}
    training: dict[str, Any] = {}
    """Of an attack that poisons data: settings of the training, on top of the clean group's."""
    seeds: Seeds = [0]
    targets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Downstream labels aimed at."""
    references: Annotated[int, Field(ge=1)] = 1
    """Reference images, of the downstream training images of the label; DRUPE takes three."""
    triggers: dict[Name, dict[str, Any]] = {}
    """Variants by name: settings that go on top of the group's."""


class Cell(_Part):
    """One encoder of a zoo with everything that makes it what it is."""

    name: str
    attack: str | None = None
    """Attack; None for a clean encoder."""
    poisons_data: bool = False
    """Whether the attack poisons the training set; otherwise it fine-tunes the clean encoder."""
    pretrain: str
    pretrain_settings: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    """Of the attack, as given."""
    trigger: str | None = None
    """Name of the trigger variant, if the recipe has several."""
    target: int | None = None
    references: int = 1
    seed: int
    clean: str | None = None
    """Cell of the clean encoder that an attack starts from, or is compared with."""
    task: Task


class ZooRecipe(_Part):
    """A named set of cells. The file's header comment says what it costs and what to expect."""

    name: Name
    title: str = ""
    defaults: Task = Task()
    clean: Annotated[list[CleanGroup], Field(min_length=1)]
    attack: list[AttackGroup] = []

    def cells(self) -> list[Cell]:
        """All cells, every clean one before the attacks on it.

        Raises:
            SettingError: a method, a setting or a clean group that does not exist, or a name given twice.
        """
        found: dict[str, Cell] = {}
        for cell in (*self._clean_cells(), *self._attack_cells()):
            if cell.name in found:
                raise SettingError(f"Two cells of {self.name} would be named {cell.name}; rename a group.")
            found[cell.name] = cell
        return list(found.values())

    def _clean_cells(self) -> Iterator[Cell]:
        for group in self.clean:
            create("pretrain", group.method, group.settings)
            task = _merged(self.defaults, group)
            _check(task)
            for seed in group.seeds:
                yield Cell(
                    name=f"{group.name}-s{seed}",
                    pretrain=group.method,
                    pretrain_settings=group.settings,
                    seed=seed,
                    task=task,
                )

    def _attack_cells(self) -> Iterator[Cell]:
        clean = {cell.name: cell for cell in self._clean_cells()}
        for group in self.attack:
            method = group.method or group.name
            poisons = issubclass(method_class("attack", method), DataPoisoning)
            _check_group(group, poisons)
            for trigger, target, seed in _grid(group):
                settings = group.settings | group.triggers.get(trigger or "", {})
                create("attack", method, settings)
                source = self._source(group, clean, seed)
                training = source.pretrain_settings | group.training
                create("pretrain", source.pretrain, training)
                task = _merged(source.task, group)
                _check(task)
                yield Cell(
                    name="-".join(filter(None, [group.name, trigger, f"t{target}", f"s{seed}"])),
                    attack=method,
                    poisons_data=poisons,
                    pretrain=source.pretrain,
                    pretrain_settings=training,
                    settings=settings,
                    trigger=trigger,
                    target=target,
                    references=group.references,
                    seed=seed,
                    clean=source.name,
                    task=task,
                )

    def _source(self, group: AttackGroup, clean: dict[str, Cell], seed: int) -> Cell:
        for name in (group.clean, f"{group.clean}-s{seed}"):
            if name in clean:
                return clean[name]
        raise SettingError(
            f"Attack group '{group.name}' needs the clean encoder '{group.clean}-s{seed}', which {self.name} "
            f"does not have; it has {', '.join(clean)}."
        )


def read_recipe(path: Path) -> ZooRecipe:
    """The recipe in a TOML file, with all its cells checked.

    Raises:
        SettingError: no such file, not TOML, an unknown key, or as ``ZooRecipe.cells``.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise SettingError(
            f"There is no recipe {path}; give a TOML file or the name of one in zoo/recipes."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not a TOML file: {error}.") from None
    try:
        recipe = ZooRecipe.model_validate(data)
    except ValidationError as error:
        raise SettingError(f"{path} is not a zoo recipe: {_explained(error)}.") from None
    recipe.cells()
    return recipe


def _explained(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, fault["loc"])))
    if fault["type"] == "extra_forbidden":
        return f"the key '{where}' is not known"
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _grid(group: AttackGroup) -> Iterator[tuple[str | None, int, int]]:
    for trigger in group.triggers or [None]:
        for target in group.targets:
            for seed in group.seeds:
                yield trigger, target, seed


def _merged(base: Task, group: Task) -> Task:
    given = {name: getattr(group, name) for name in group.model_fields_set & set(Task.model_fields)}
    return Task.model_validate(base.model_dump() | given)


def _check_group(group: AttackGroup, poisons: bool) -> None:
    given = group.model_fields_set.intersection(_OF_THE_CLEAN)
    if poisons:  # trains anew, so it may do so at another precision
        given = given - {"precision"}
    if given:
        raise SettingError(
            f"Attack group '{group.name}' sets '{sorted(given)[0]}', which its clean encoder decides; set it "
            "there."
        )
    if group.training and not poisons:
        raise SettingError(
            f"Attack group '{group.name}' sets 'training', but its attack fine-tunes a finished encoder; set "
            "its length and learning rate under 'settings'."
        )


def _check(task: Task) -> None:
    spec_for(task.architecture, width=task.width, stem=task.stem, normalisation=task.normalisation)
    make_probe(task.probe, **task.probe_settings)
