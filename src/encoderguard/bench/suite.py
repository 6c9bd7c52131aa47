"""Suites: what a table or figure of a paper needs, in sizes from minutes on two cores to the paper's own."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from encoderguard.backbones import Stem
from encoderguard.errors import SettingError

__all__ = ["Choice", "Size", "SizeName", "Suite", "Task", "load_suite", "size_named", "suite_names"]

SizeName = Literal["tiny", "digits", "small", "paper"]
_HERE = Path(__file__).parent


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Task(_Model):
    """A downstream task, and the class that an attacker of it aims at."""

    name: str
    train: str
    test: str
    target: Annotated[int, Field(ge=0)]


class Size(_Model):
    """Everything that differs between a run of minutes and the paper's own."""

    images: str
    """Pre-training set; shadow, clean and scanned images are drawn from it too."""
    auxiliary: str
    """Images of another kind, for those who have none of the pre-training set."""
    tasks: tuple[Task, ...]
    own_task: str
    """The task whose images are the pre-training set's: where data poisoners aim."""
    architecture: str = "resnet18"
    width: int = 64
    stem: Stem = "cifar"
    normalisation: str | None = None
    image_size: int | None = None
    pretrain_count: int | None = None
    shadow_count: int | None = None
    clean_count: int
    """Unlabelled images that a defense gets."""
    scan_count: int
    """Unlabelled images that a detector gets."""
    probe: str = "linear"
    probe_settings: dict[str, Any] = {}
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, dict[str, Any]] = {}
    """Settings by method, as ``family.name``; a suite's own override them."""
    zoo: str | None = None
    """Folder of a zoo whose encoders are taken instead of training and attacking anew."""
    victims: tuple[str, ...] = ()
    """Names of the zoo's attacked encoders that are taken; all that fit by default."""


class Choice(_Model):
    """A method in a grid."""

    name: str
    label: str = ""
    """How the row is called; the name by default."""
    settings: dict[str, Any] = {}
    count: int | None = None
    """Images for this choice instead of the size's."""
    share: Annotated[float, Field(gt=0)] | None = None
    """Of the size's number of images instead."""
    images: Literal["own", "auxiliary"] = "own"
    """Whether a detector or a defense gets images of the pre-training set or of another one."""
    stamped: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a defense's images that the benchmark stamps with the trigger, to see what that does."""
    architecture: str | None = None
    """Of the encoder that is attacked, instead of the size's."""
    x: float | None = None
    """Place on the horizontal axis of a figure."""

    @property
    def title(self) -> str:
        """The label, or the name."""
        return self.label or self.name


class Suite(_Model):
    """One table or figure."""

    name: str = ""
    title: str
    paper: Literal["mimic", "ssl_defender", "decree", "none"]
    item: str
    kind: Literal["defenses", "detectors", "profile"] = "defenses"
    """``defenses``: ACC and ASR after each; ``detectors``: score and verdict on clean and backdoored
    encoders; ``profile``: dependence of each stage on the features, clean and triggered."""
    expected: str
    """What a run should show, in words, with a range."""
    cost: dict[str, str] = {}
    """By size."""
    pretrains: tuple[str, ...] = ("simclr",)
    attacks: tuple[Choice, ...] = (Choice(name="badencoder"),)
    defenses: tuple[Choice, ...] = ()
    detectors: tuple[Choice, ...] = ()
    tasks: tuple[str, ...] = ()
    """Names of the size's tasks; all of them by default."""
    maps: bool = False
    """Keep and draw where images lie in feature space, also for the clean encoder under the same trigger."""
    axis: str = ""
    """Name of the horizontal axis, if this is a figure over ``x``."""
    published: tuple[dict[str, str | float | bool | None], ...] = ()
    """The paper's own numbers: keys of a row (attack, defense, task, ...) and its values in per cent."""
    slips: tuple[str, ...] = ()
    """Known mistakes of the published item."""
    sizes: dict[SizeName, dict[str, Any]] = {}
    """Fields of this suite that are different in a size."""

    def sized(self, size: SizeName) -> "Suite":
        """The suite with the changes for ``size`` made."""
        changed = self.model_dump() | self.sizes.get(size, {}) | {"sizes": {}}
        return Suite.model_validate(changed)


def suite_names() -> list[str]:
    """Names of the suites that come with the package, sorted."""
    return sorted(path.stem for path in (_HERE / "suites").glob("*.toml"))


def load_suite(name: str) -> Suite:
    """A suite by name, or from a TOML file.

    Raises:
        SettingError: there is none, or it is not valid.
    """
    path = Path(name) if name.endswith(".toml") else _HERE / "suites" / f"{name}.toml"
    if not path.is_file():
        raise SettingError(f"There is no suite '{name}'; expected a TOML file or one of: {_listed()}.")
    return Suite.model_validate(_read(path, Suite) | {"name": path.stem})


def size_named(name: str) -> Size:
    """One of the sizes, or a TOML file with the fields of one.

    Raises:
        SettingError: there is none, or it is not valid.
    """
    if name.endswith(".toml"):
        return Size.model_validate(_read(Path(name), Size))
    with (_HERE / "sizes.toml").open("rb") as file:
        sizes = tomllib.load(file)
    if name not in sizes:
        raise SettingError(f"Unknown size '{name}'; expected one of: {', '.join(sizes)}, or a TOML file.")
    return Size.model_validate(sizes[name])


def _read(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            held = tomllib.load(file)
        kind.model_validate(held)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path} is not valid TOML: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingError(
            f"{path} is not a valid {kind.__name__.lower()}: {where}: {first['msg']}."
        ) from None
    return held


def _listed() -> str:
    return ", ".join(suite_names())
