"""A step of a cell: kept if it is finished, taken over from elsewhere, continued where it stopped, or run."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from encoderguard.errors import UsageError
from encoderguard.jobs.options import JobOptions
from encoderguard.results import RESULT, Record
from encoderguard.zoo.identity import difference, finished

__all__ = ["Step", "current", "done"]


class Step(NamedTuple):
    """A job that a cell needs."""

    folder: Path
    expected: Mapping[str, Any]
    """Facts that its record must have; see ``identity.difference``."""
    defaults: Mapping[str, Any]
    """Of the method's settings."""

    def fits(self, record: Record | None) -> bool:
        """Whether the record of a finished job is of this step."""
        return record is not None and difference(record, self.expected, self.defaults) is None


def current(step: Step) -> Record | None:
    """The record of the step, if it is finished and what the cell asks for."""
    record = finished(step.folder)
    return record if step.fits(record) else None


def done(
    step: Step, run: Callable[[JobOptions], Record], options: Mapping[str, Any], *, adopt: Path | None
) -> Record:
    """Have the step done, with as little work as possible.

    Args:
        step: what is to be there afterwards.
        run: runs the job with the options of jobs.
        options: those but the folder.
        adopt: a folder below which a finished training may lie.

    Raises:
        UsageError: as the job.
        RunError: as the job.
        Stopped: the user asked to stop.
    """
    record = current(step) or (_adopted(step, adopt) if adopt is not None else None)
    if record is not None:
        return record
    shared: Any = {**options, "out": step.folder}
    if any(step.folder.glob("checkpoint*.pt")) and finished(step.folder) is None:
        try:
            return run(shared | {"resume": True})
        except UsageError:  # what stopped there was another job, or its checkpoint does not fit
            pass
    return run(shared | {"overwrite": True})


def _adopted(step: Step, where: Path) -> Record | None:
    """A finished job from elsewhere, copied into the cell."""
    for path in sorted(where.rglob(RESULT)):
        record = finished(path.parent)
        if record is None or not step.fits(record):
            continue
        part = step.folder.with_name(".adopting")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(path.parent, part)
        shutil.rmtree(step.folder, ignore_errors=True)
        part.rename(step.folder)
        return record
    return None
