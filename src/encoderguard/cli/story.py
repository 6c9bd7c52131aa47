"""The command that tells the whole story."""

from typing import Annotated

import typer

from encoderguard.cli.commands import Resume, finish
from encoderguard.cli.options import Common, command
from encoderguard.cli.running import run_job

__all__ = ["demo"]


@command
def demo(
    recipe: Annotated[
        str, typer.Option(help="Sizes and lengths of all steps: digits, cifar10, paper.")
    ] = "digits",
    images: Annotated[
        str | None, typer.Option(help="Images to pre-train on.", show_default="the recipe's")
    ] = None,
    downstream_train: Annotated[
        str | None, typer.Option(help="Labelled images for the probes.", show_default="the recipe's")
    ] = None,
    downstream_test: Annotated[
        str | None, typer.Option(help="Labelled images to judge with.", show_default="the recipe's")
    ] = None,
    target: Annotated[
        int | None, typer.Option(min=0, help="Label of triggered images.", show_default="the recipe's")
    ] = None,
    clean_encoder: Annotated[
        str | None, typer.Option(help="An encoder to start from.", show_default="one is pre-trained")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often to tell it, with consecutive seeds.")] = 1,
    resume: Resume = False,
    *,
    common: Common,
) -> int:
    """Tell the whole story: train, backdoor, scan, purify, evaluate."""
    from encoderguard.demo import run_demo

    record = run_job(
        "demo",
        common,
        lambda **options: run_demo(
            recipe=recipe,
            images=images,
            downstream_train=downstream_train,
            downstream_test=downstream_test,
            target=target,
            clean_encoder=clean_encoder,
            seeds=seeds,
            **options,
        ),
        resume=resume,
    )
    return finish(record, common)
