"""Options that several commands share, declared once, and the settings of methods."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from encoderguard.cli.running import guarded
from encoderguard.errors import SettingError

__all__ = ["Common", "Count", "Settings", "command", "parse_settings"]

Settings = Annotated[
    list[str] | None,
    typer.Option("-p", "--setting", metavar="NAME=VALUE", help="A setting of the method; may be repeated."),
]
DetectorName = Annotated[
    str | None,
    typer.Option(help="See 'encoderguard list'.", show_default="trigger_search with references, else decree"),
]
References = Annotated[
    list[str] | None,
    typer.Option(
        help="A clean encoder of the same architecture, or a zoo's folder with some; may be repeated."
    ),
]
Count = Annotated[int | None, typer.Option(min=1, help="Images to draw with the seed.")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every job."""

    image_size: Annotated[int | None, typer.Option(min=2, help="Bring images to this side in pixels.")] = None
    data_root: Annotated[Path | None, typer.Option(help="Where torchvision keeps its data sets.")] = None
    download: Annotated[
        bool,
        typer.Option("--download", help="Download a named data set if it is missing."),
    ] = False
    skip_unreadable: Annotated[
        bool,
        typer.Option("--skip-unreadable", help="Leave out broken images and list them."),
    ] = False
    normalisation: Annotated[
        str | None,
        typer.Option(
            help="Replaces the encoder's: cifar10, stl10, imagenet, clip or none.",
        ),
    ] = None
    input_size: Annotated[
        int | None,
        typer.Option(min=0, help="Side to which the encoder resizes; 0: not at all."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="a new one in runs/"),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace the run that the folder holds.")] = False
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    precision: Annotated[
        Literal["auto", "bf16", "float32"],
        typer.Option(help="bf16 or float32; auto takes what is fast here."),
    ] = "auto"
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print nothing but the record."),
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", hidden=True),
    ] = False


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command that takes ``common: Common`` all the options of Common, and errors an exit code."""
    own = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(Common, include_extras=True)
    kept = [parameter for name, parameter in own.parameters.items() if name != "common"]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in kept]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shared[name])
        for name, default in ((field.name, field.default) for field in fields(Common))
    ]

    @wraps(function)
    def wrapper(**given: Any) -> int:
        common = Common(**{field.name: given.pop(field.name) for field in fields(Common)})
        return guarded(lambda: function(**given, common=common), debug=common.debug)

    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {"return": int, **{each.name: each.annotation for each in parameters}}
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
