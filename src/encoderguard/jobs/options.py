"""The arguments that every job takes, and what becomes of them."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from encoderguard.errors import SettingError
from encoderguard.jobs.folder import RunFolder
from encoderguard.random import Rng
from encoderguard.run import Precision, Progress, Run, StopSignal, resolve_device

__all__ = ["JobOptions", "check_options", "open_folder", "surroundings"]


class JobOptions(TypedDict, total=False):
    """Keyword arguments that every job takes; all are optional."""

    seed: int
    """Same seed, same result; 0 by default."""
    device: str
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    devices: int
    """How many devices share each training step, one process each; 1 by default. Not every method can."""
    precision: Precision | Literal["auto"]
    out: Path | str | None
    """Folder for the record, the report and the outputs; None writes nothing."""
    resume: bool
    """Continue the unfinished run in ``out``."""
    overwrite: bool
    """Replace a run that ``out`` holds."""
    progress: Progress | None
    stop: StopSignal | None
    """Set it to stop between two steps; the job then raises Stopped."""
    image_size: int | None
    """Side in pixels to which images are brought; for image specs, as are the next three."""
    data_root: Path | str | None
    """Where torchvision keeps its data sets."""
    download: bool
    skip_unreadable: bool
    normalisation: str | None
    """Replaces an encoder's own, by name; for encoder specs, as is the next one."""
    input_size: int | None
    """Side in pixels to which the encoder resizes; 0 takes images as they are."""
    command: Sequence[str] | None
    """Command line, for the record."""


def check_options(options: JobOptions) -> None:
    """Raise SettingError on an unknown option, before anything is touched."""
    known = JobOptions.__annotations__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SettingError(f"Unknown option '{unknown[0]}'; expected one of: {', '.join(sorted(known))}.")
    if options.get("precision", "auto") not in ("auto", "bf16", "float32"):
        raise SettingError(f"The precision must be auto, bf16 or float32, found '{options['precision']}'.")
    if options.get("devices", 1) < 1:
        raise SettingError(f"The number of devices must be at least 1, found {options['devices']}.")
    if options.get("devices", 1) > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingError("A script must start a job on several devices below `if __name__ == '__main__':`.")


def surroundings(options: JobOptions) -> Run:
    """What the options say about seed, device, precision, progress and stopping.

    Raises:
        SettingError: there is no such device here.
    """
    given: dict[str, Any] = {key: options.get(key) for key in ("stop", "progress", "precision")}
    return Run(
        rng=Rng(options.get("seed", 0)),
        device=resolve_device(options.get("device", "auto")),
        resume=options.get("resume", False),
        **{key: value for key, value in given.items() if value is not None},
    )


def open_folder(options: JobOptions) -> RunFolder | None:
    """The folder that ``out`` names, prepared. Raises as RunFolder."""
    out, resume = options.get("out"), options.get("resume", False)
    if out is None:
        if resume:
            raise SettingError("Resuming needs the folder of the unfinished run; give it as out.")
        return None
    return RunFolder(Path(out), resume=resume, overwrite=options.get("overwrite", False))
