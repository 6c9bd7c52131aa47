"""Options that several commands share, declared once, and the settings of methods."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from encoderguard.cli.running import guarded
from encoderguard.errors import SettingError

__all__ = ["Common", "Count", "Precision", "Settings", "command", "parse_settings"]

_IMAGES, _RUN = "Images and encoder", "Run"


class Precision(str, Enum):  # noqa: UP042 - typer shows the values of a str Enum
    """Arithmetic of the bulk of a run."""

    auto = "auto"
    bf16 = "bf16"
    float32 = "float32"


Settings = Annotated[
    list[str] | None,
    typer.Option("-p", "--setting", metavar="NAME=VALUE", help="A setting of the method; may be repeated."),
]
Count = Annotated[int | None, typer.Option(min=1, help="Images to draw with the seed.")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every job."""

    image_size: Annotated[
        int | None, typer.Option(min=1, help="Bring images to this side in pixels.", rich_help_panel=_IMAGES)
    ] = None
    data_root: Annotated[
        Path | None, typer.Option(help="Where torchvision keeps its data sets.", rich_help_panel=_IMAGES)
    ] = None
    download: Annotated[
        bool,
        typer.Option(
            "--download", help="Download a named data set if it is missing.", rich_help_panel=_IMAGES
        ),
    ] = False
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out broken images and list them.", rich_help_panel=_IMAGES
        ),
    ] = False
    normalisation: Annotated[
        str | None,
        typer.Option(
            help="Normalisation of the encoder, if its own is unknown or wrong: cifar10, stl10, imagenet, clip, none.",
            rich_help_panel=_IMAGES,
        ),
    ] = None
    input_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Side to which the encoder resizes; 0: not at all.", rich_help_panel=_IMAGES
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results [default: a new one in runs/].", rich_help_panel=_RUN),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run that the folder holds.", rich_help_panel=_RUN)
    ] = False
    seed: Annotated[int, typer.Option(help="Same seed, same result.", rich_help_panel=_RUN)] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_RUN)] = "auto"
    precision: Annotated[Precision, typer.Option(rich_help_panel=_RUN)] = Precision.auto
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the record, and nothing else, on standard output.", rich_help_panel=_RUN
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_RUN, hidden=True),
    ] = False


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command that takes ``common: Common`` all the options of Common, and errors an exit code."""
    own = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(Common, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in own.parameters.items()
        if name != "common"
    ]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared[field.name]
        )
        for field in fields(Common)
    ]

    @wraps(function)
    def wrapper(**given: Any) -> int:
        common = Common(**{field.name: given.pop(field.name) for field in fields(Common)})
        return guarded(lambda: function(**given, common=common), debug=common.debug)

    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        "return": int
    }
    del wrapper.__wrapped__  # typer would look through to the signature without the shared options
    return wrapper


def parse_settings(given: Sequence[str] | None) -> dict[str, str]:
    """``name=value`` texts as a dictionary.

    Raises:
        SettingError: no ``=``, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise SettingError(f"A setting must be given as NAME=VALUE, found '{text}'.")
        if name.strip() in found:
            raise SettingError(f"The setting '{name.strip()}' was given twice; give it once.")
        found[name.strip()] = value.strip()
    return found
