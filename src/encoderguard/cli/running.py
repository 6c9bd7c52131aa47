"""Runs a job for the command line: folder, progress, Ctrl-C, warnings, and errors as one sentence."""

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from encoderguard.errors import EncoderGuardError, OutputError

if TYPE_CHECKING:
    from encoderguard.cli.options import Common
    from encoderguard.run import Progress, StopSignal

__all__ = ["STOPPED", "USAGE", "default_folder", "guarded", "put", "run_job", "say", "watched"]

STOPPED, USAGE = 130, 4
_UNUSABLE = {
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}
_DEBUG = "ENCODERGUARD_DEBUG"
T = TypeVar("T")


def say(text: str) -> None:
    """A line for the person at the terminal; standard output is kept for results."""
    print(text, file=sys.stderr, flush=True)


def put(text: str, end: str = "\n") -> None:
    """A result, to standard output. That its reader has gone, as in ``... | head``, changes no exit code."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _silence()


def _silence() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that Python's last flush is quiet


def guarded(work: Callable[[], int], *, debug: bool = False) -> int:
    """Run ``work``; an error becomes one sentence and its exit code, with a traceback only for debugging."""
    try:
        return work()
    except KeyboardInterrupt:
        say("Stopped.")
        return STOPPED
    except BrokenPipeError:
        _silence()
        return 0
    except Exception as error:
        if debug or os.environ.get(_DEBUG):
            traceback.print_exc()
        code, sentence = _explained(error)
        say(f"Error: {sentence}")
        return code


def _explained(error: Exception) -> tuple[int, str]:
    if isinstance(error, EncoderGuardError):
        return error.exit_code, str(error)
    reason = " ".join(str(error).split()) or "no reason was given"
    if isinstance(error, OSError) and error.errno in _UNUSABLE:
        return USAGE, f"{str(error.filename)[:200]} cannot be used: {error.strerror}; give another path."
    exhausted = isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason
    if exhausted or type(error).__name__ == "OutOfMemoryError":
        advice = "use a smaller batch size, smaller images, or another --device"
        return 2, f"There is not enough memory ({reason[:200]}); {advice}."
    return 2, f"An unexpected {type(error).__name__}: {reason[:500]}; run again with --debug to see where."


def default_folder(name: str, *, resume: bool) -> Path:
    """``runs/NAME``, else ``runs/NAME-2`` and so on: a new folder, or to resume the last unfinished one."""
    number, path, last = 1, Path("runs") / name, Path("runs") / name
    while path.exists():
        last = path if _unfinished(path) or _interrupted(path) else last
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return last if resume else path


def _unfinished(folder: Path) -> bool:
    """Whether a stopped run, or a step of one, kept its state there."""
    return any(folder.rglob("resume.json"))


def _interrupted(folder: Path) -> bool:
    from encoderguard.results import read_record

    try:
        return read_record(folder).status == "interrupted"
    except EncoderGuardError:
        return False


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"Warning: {record.getMessage()}")

    logger, handler = logging.getLogger("encoderguard"), Handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def watched() -> Iterator[tuple["Progress", "StopSignal"]]:
    """Progress bars, and a signal that Ctrl-C sets, for work that is not a single job."""
    from encoderguard.progress import ProgressBars
    from encoderguard.run import StopSignal

    stop, bars = StopSignal(), ProgressBars()
    with _warnings_shown(), stop.listening(), bars:
        yield bars, stop


def run_job(name: str, common: "Common", work: Callable[..., T], *, resume: bool = False) -> T:
    """Call ``work`` with the options of a job; Ctrl-C stops it between two steps and says how to continue.

    Raises:
        OutputError: no new folder can be made.
        Stopped: the user asked to stop.
    """
    from encoderguard.progress import ProgressBars
    from encoderguard.run import StopSignal

    out = common.out or default_folder(name, resume=resume)
    if not str(out).strip():
        raise OutputError("The output folder must have a name; give one with --out.")
    stop, bars = StopSignal(), ProgressBars()
    options: dict[str, Any] = {
        "seed": common.seed,
        "device": common.device,
        "precision": common.precision,
        "out": out,
        "resume": resume,
        "overwrite": common.force,
        "progress": bars,
        "stop": stop,
        "image_size": common.image_size,
        "data_root": common.data_root,
        "download": common.download,
        "skip_unreadable": common.skip_unreadable,
        "normalisation": common.normalisation,
        "input_size": common.input_size,
        "command": ["encoderguard", *sys.argv[1:]],
    }
    try:
        # Libraries that print something must not get between the reader of a record and its JSON.
        with _warnings_shown(), stop.listening(), bars, contextlib.redirect_stdout(sys.stderr):
            return work(**options)
    except KeyboardInterrupt:
        if _unfinished(out) or (name == "demo" and _interrupted(out)):
            say(f"To continue, give the same command with --out {out} --resume.")
        raise
