"""The commands that run a job: one function per job, from arguments to its record."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from encoderguard.cli.methods import fine_tuning, poisoning
from encoderguard.cli.options import (
    Common,
    Count,
    DetectorName,
    References,
    Settings,
    command,
    parse_settings,
)
from encoderguard.cli.running import put, run_job
from encoderguard.results import PurifyRecord, Record, to_json

__all__ = ["attack", "evaluate", "finish", "poison", "pretrain", "purify", "scan"]

_EXIT = {"clean": 0, "backdoored": 1, "inconclusive": 3}
_UNCHANGED = 3
_SETS = "a folder, .npz or .parquet file, digits, or a name such as cifar10:train"
_ENCODER = "A bundle (.safetensors), a checkpoint, timm:NAME or torchvision:NAME."

EncoderArgument = Annotated[str, typer.Argument(metavar="ENCODER", help=_ENCODER, show_default=False)]
CleanImages = Annotated[
    str,
    typer.Option(help=f"Clean unlabelled images like those it was trained on: {_SETS}.", show_default=False),
]
Devices = Annotated[
    int, typer.Option(min=1, help="Devices that share each training step; some methods need one.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the folder.")]


def finish(record: Record, common: Common) -> int:
    """Print a record as asked; the exit code that belongs to it."""
    if common.as_json:
        put(to_json(record), end="")
    else:
        from encoderguard.cli.wording import describe

        put(describe(record))
    if isinstance(record, PurifyRecord) and record.unchanged:
        return _UNCHANGED
    return _EXIT.get(str(getattr(record, "verdict", None)), 0)


@command
def pretrain(
    method: Annotated[str, typer.Argument(help="Such as simclr; see 'encoderguard list'.")] = "simclr",
    images: Annotated[str, typer.Option(help=f"Images to train on: {_SETS}.")] = "digits:train",
    arch: Annotated[str, typer.Option(help="resnet18, resnet34, timm:NAME, torchvision:NAME.")] = "resnet18",
    width: Annotated[int, typer.Option(min=1, help="Channels of the first stage of a ResNet.")] = 64,
    stem: Annotated[Literal["cifar", "imagenet"], typer.Option(help="First layers of a ResNet.")] = "cifar",
    count: Count = None,
    monitor_train: Annotated[
        str | None, typer.Option(help="Labelled images, to show kNN accuracy while training.")
    ] = None,
    monitor_test: Annotated[str | None, typer.Option(help="Labelled images that the accuracy is of.")] = None,
    monitor_every: Annotated[int, typer.Option(min=1, help="Epochs between two measurements.")] = 1,
    setting: Settings = None,
    devices: Devices = 1,
    resume: Resume = False,
    *,
    common: Common,
) -> int:
    """Train an encoder."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"pretrain-{method}",
        common,
        lambda **options: jobs.pretrain(
            images,
            method=method,
            settings=settings,
            architecture=arch,
            width=width,
            stem=stem,
            count=count,
            monitor_train=monitor_train,
            monitor_test=monitor_test,
            monitor_every=monitor_every,
            devices=devices,
            **options,
        ),
        resume=resume,
    )
    return finish(result.record, common)


@command
def attack(
    method: Annotated[
        str,
        typer.Argument(
            help="Such as badencoder; see 'encoderguard list'.", show_default=False, callback=fine_tuning
        ),
    ],
    encoder: EncoderArgument,
    images: Annotated[str, typer.Option(help=f"The attacker's unlabelled images: {_SETS}.")] = "digits:train",
    reference: Annotated[
        list[Path] | None, typer.Option(help="Image of the target class: a picture, or the field's .npz.")
    ] = None,
    downstream: Annotated[
        str | None,
        typer.Option(help="The attacker's labelled images, to choose a reference of --target from."),
    ] = None,
    target: Annotated[int | None, typer.Option(min=0, help="Label that triggered images shall get.")] = None,
    reference_count: Annotated[int, typer.Option(min=1, help="References to choose from --downstream.")] = 1,
    count: Count = None,
    setting: Settings = None,
    resume: Resume = False,
    *,
    common: Common,
) -> int:
    """Plant a backdoor in a copy of a clean encoder, to test with."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"attack-{method}",
        common,
        lambda **options: jobs.attack(
            encoder,
            images,
            method=method,
            settings=settings,
            references=reference or (),
            downstream=downstream,
            target=target,
            reference_count=reference_count,
            count=count,
            **options,
        ),
        resume=resume,
    )
    return finish(result.record, common)


@command
def poison(
    method: Annotated[
        str,
        typer.Argument(
            help="Such as ssl_backdoor; see 'encoderguard list'.", show_default=False, callback=poisoning
        ),
    ],
    target: Annotated[
        int, typer.Option(min=0, help="Label that triggered images shall get.", show_default=False)
    ],
    images: Annotated[str, typer.Option(help=f"Labelled images: {_SETS}.")] = "digits:train",
    references: Annotated[
        str | None,
        typer.Option(
            help="Pictures of the class aimed at, for attacks that paste them.",
            show_default="those in the images",
        ),
    ] = None,
    count: Count = None,
    setting: Settings = None,
    *,
    common: Common,
) -> int:
    """Poison a copy of a training set, to train an encoder on and test with."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"poison-{method}",
        common,
        lambda **options: jobs.poison(
            images,
            method=method,
            target=target,
            settings=settings,
            references=references,
            count=count,
            **options,
        ),
    )
    return finish(result.record, common)


@command
def scan(
    encoder: EncoderArgument,
    images: CleanImages,
    detector: DetectorName = None,
    references: References = None,
    count: Count = None,
    setting: Settings = None,
    resume: Resume = False,
    *,
    common: Common,
) -> int:
    """Look for the behaviour of a backdoor in an encoder. Exit code 1: found, 3: inconclusive."""
    from encoderguard import jobs

    settings = jobs.with_references(parse_settings(setting), references or [])
    result = run_job(
        f"scan-{detector or jobs.detector_for(settings)}",
        common,
        lambda **options: jobs.scan(
            encoder,
            images,
            detector=detector,
            settings=settings,
            count=count,
            **options,
        ),
        resume=resume,
    )
    return finish(result.record, common)


@command
def purify(
    encoder: EncoderArgument,
    images: CleanImages,
    defense: Annotated[str, typer.Option(help="See 'encoderguard list'.")] = "mimic",
    count: Count = None,
    setting: Settings = None,
    devices: Devices = 1,
    resume: Resume = False,
    *,
    common: Common,
) -> int:
    """Make an encoder that behaves like a suspect one, without its backdoor. Exit code 3: nothing changed."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"purify-{defense}",
        common,
        lambda **options: jobs.purify(
            encoder, images, defense=defense, settings=settings, count=count, devices=devices, **options
        ),
        resume=resume,
    )
    return finish(result.record, common)


@command
def evaluate(
    encoder: EncoderArgument,
    train: Annotated[str, typer.Option(help=f"Labelled images to fit the probe: {_SETS}.")] = "digits:train",
    test: Annotated[str, typer.Option(help="Labelled images to judge with.")] = "digits:test",
    trigger: Annotated[
        Path | None, typer.Option(help="The attacker's trigger: trigger.json or the field's .npz.")
    ] = None,
    target: Annotated[
        int | None, typer.Option(min=0, help="The label aimed at; needed with a trigger.")
    ] = None,
    clean_encoder: Annotated[
        str | None, typer.Option(help="Measured beside it, as the floor of the ASR.")
    ] = None,
    probe: Annotated[str, typer.Option(help="mlp, linear or knn.")] = "mlp",
    seeds: Annotated[int, typer.Option(min=1, help="Probes to fit.")] = 1,
    setting: Settings = None,
    *,
    common: Common,
) -> int:
    """Measure accuracy and, with a known trigger, attack success on a downstream task."""
    from encoderguard import jobs

    settings = parse_settings(setting)
    result = run_job(
        f"evaluate-{probe}",
        common,
        lambda **options: jobs.evaluate(
            encoder,
            train,
            test,
            trigger=trigger,
            target=target,
            clean_encoder=clean_encoder,
            probe=probe,
            settings=settings,
            seeds=seeds,
            **options,
        ),
    )
    return finish(result.record, common)
