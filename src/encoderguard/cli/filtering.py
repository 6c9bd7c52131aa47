"""The command that ranks a training set."""

from typing import Annotated

import typer

from encoderguard.cli.commands import EncoderArgument, finish
from encoderguard.cli.options import Common, Settings, command, parse_settings
from encoderguard.cli.running import run_job

__all__ = ["filter_images"]

_SETS = "a folder, .npz or .parquet file, digits, or a name such as cifar10:train"


@command
def filter_images(
    method: Annotated[
        str, typer.Argument(help="Such as patch_search; see 'encoderguard list'.", show_default=False)
    ],
    encoder: EncoderArgument,
    images: Annotated[str, typer.Option(help=f"The training set of the encoder: {_SETS}.")] = "digits:train",
    top: Annotated[int, typer.Option(min=1, help="The most suspicious images, to drop.")] = 100,
    setting: Settings = None,
    *,
    common: Common,
) -> int:
    """Rank the images of a training set by how likely they are poison, with the encoder trained on it."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"filter-{method}",
        common,
        lambda **options: jobs.filter_images(
            encoder, images, method=method, settings=settings, top=top, **options
        ),
    )
    return finish(result.record, common)
