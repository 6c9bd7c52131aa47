"""The folder of one run: refused if occupied, resumable while unfinished, and never left half-written."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from encoderguard.errors import EncoderGuardError, OutputError, SettingError, UsageError
from encoderguard.results import RESULT, Record, read_record, write_record
from encoderguard.storage import FolderLock, prepare_folder, write_text
from encoderguard.triggers.files import PLAIN, RECOVERED, STRONGEST

__all__ = [
    "ARRAYS",
    "ENCODER",
    "HEAD",
    "KEPT",
    "MANIFEST",
    "PLAIN",
    "POISONED",
    "RANKING",
    "RECOVERED",
    "REPORT",
    "STRONGEST",
    "TRIGGER",
    "RunFolder",
    "compare_runs",
    "read_identity",
]

ENCODER, TRIGGER = "encoder.safetensors", "trigger.json"
POISONED, MANIFEST = "poisoned.npz", "manifest.json"
RANKING, KEPT = "ranking.json", "kept.json"
HEAD = "head.safetensors"
ARRAYS, REPORT = "arrays.npz", "report.html"
_FILES = (
    ENCODER,
    HEAD,
    TRIGGER,
    RECOVERED,
    STRONGEST,
    PLAIN,
    POISONED,
    MANIFEST,
    RANKING,
    KEPT,
    ARRAYS,
    REPORT,
    RESULT,
)
_IDENTITY = "resume.json"
_NEW = ".new-"


class RunFolder:
    """A folder that is prepared before any work and filled after it; one run at a time.

    An earlier run that is to be replaced stays until the new one has written everything.

    Raises:
        OutputError: it cannot be written, another run is at work there, it holds a run and neither ``resume``
            nor ``overwrite`` is set, or it holds files of a run's names that no run left there.
        SettingError: ``resume`` is set and there is nothing to resume.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.resume = path, resume
        self._stored: list[Path] = []
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._held = _hold(path) if path.is_dir() else None
        try:
            self._kept = self._check_free(overwrite)
            prepare_folder(path)
            self._held = self._held or _hold(path)
        except EncoderGuardError:
            self._remove_made()
            self._release()  # not only once nobody looks at the error any more
            raise

    @property
    def checkpoint(self) -> Path:
        """Where training keeps its state; parts of a method add to the name."""
        return self.path / "checkpoint.pt"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there."""
        return sorted(self.path.glob("checkpoint*.pt"))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note what is about to run; when resuming, compare it with what ran before.

        Raises:
            SettingError: the unfinished run had another seed, setting, encoder or image set.
        """
        file = self.path / _IDENTITY
        if self.resume:
            compare_runs(self.path, read_identity(file), json.loads(json.dumps(identity)))
        else:
            for old in self.checkpoints():
                old.unlink()
            for old in self.path.glob(f"{_NEW}*"):  # of a run that was killed
                shutil.rmtree(old, ignore_errors=True)
            write_text(file, json.dumps(identity, indent=2) + "\n")

    def require_apart(self, file: Path) -> None:
        """An input must not be a file that this run replaces.

        Raises:
            OutputError: it is.
        """
        names = {*_FILES, _IDENTITY, *(path.name for path in self.checkpoints())}
        if file.name in names and file.parent.resolve() == self.path.resolve():
            raise OutputError(
                f"{file} is an input and lies in the folder of the results, where it would be replaced; "
                "choose another folder with --out."
            )

    def store(self, outputs: Mapping[str, Callable[[Path], object]]) -> dict[str, str]:
        """Write the files of a finished run, then put them in the place of older ones; file name to sha256.

        Raises:
            OutputError: a file cannot be written.
            StorageError: the disk is full; what was there before stays.
        """
        digests = {}
        with tempfile.TemporaryDirectory(dir=self.path, prefix=_NEW) as new:
            for name, write in outputs.items():
                write(Path(new) / name)
                digests[name] = _sha256(Path(new) / name)
            self._clear()
            self._kept = False
            for name in outputs:
                self._stored.append(self.path / name)
                (Path(new) / name).replace(self.path / name)
        return digests

    def finish(self, record: Record) -> None:
        """Write the record, after which nothing needs to be resumed."""
        self._stored.append(self.path / RESULT)
        write_record(record, self.path)
        for leftover in (*self.checkpoints(), self.path / _IDENTITY):
            leftover.unlink(missing_ok=True)
        self._release()

    def fail(self, record: Record) -> None:
        """Remove what a failed run stored; leave its record unless a finished run is kept."""
        with contextlib.suppress(EncoderGuardError, OSError):  # the first error is the one to report
            if not self.checkpoints():
                (self.path / _IDENTITY).unlink(missing_ok=True)
            if not self._kept:
                self._clear()
                write_record(record, self.path)
        self._release()

    def abandon(self) -> None:
        """Leave no trace of a run that could not start."""
        for path in self._stored:
            path.unlink(missing_ok=True)
        if not self.resume and not self.checkpoints():
            (self.path / _IDENTITY).unlink(missing_ok=True)
        self._remove_made()
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # they are not empty
            for folder in self._made:
                folder.rmdir()

    def _clear(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def _check_free(self, overwrite: bool) -> bool:
        """Whether a finished run is there, which stays until it is replaced."""
        begun = (self.path / _IDENTITY).exists()
        unfinished = begun and bool(self.checkpoints())
        earlier = self._earlier()
        finished = earlier is not None and earlier.status == "success"
        if self.resume:
            if not self.checkpoints():
                raise SettingError(
                    f"There is nothing to resume in {self.path}, it holds no checkpoint; "
                    "run the command without --resume."
                )
            return finished
        if not begun and (names := self._foreign(earlier)):
            raise OutputError(
                f"{self.path} holds {', '.join(names)}, which no run left there and this one would replace; "
                "choose another folder with --out."
            )
        if unfinished and not overwrite:
            raise OutputError(
                f"{self.path} holds an unfinished run; continue it with --resume, discard it with --force, "
                "or choose another folder with --out."
            )
        if finished and not overwrite:
            raise OutputError(
                f"{self.path} holds a finished run; choose another folder with --out, "
                "or replace the run with --force."
            )
        return finished

    def _earlier(self) -> Record | None:
        try:
            return read_record(self.path / RESULT)
        except UsageError:
            return None

    def _foreign(self, earlier: Record | None) -> list[str]:
        """Files with the names of ours that the record does not name."""
        known = set() if earlier is None else {RESULT, REPORT, *earlier.outputs}
        there = [name for name in _FILES if (self.path / name).exists()]
        return [name for name in (*there, *(path.name for path in self.checkpoints())) if name not in known]


def _hold(path: Path) -> FolderLock:
    refusal = f"Another run is at work in {path}; wait for it, or choose another folder with --out."
    return FolderLock(path, refusal)


def read_identity(file: Path) -> dict[str, Any]:
    """What an unfinished run noted about itself. Raises SettingError: missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise SettingError(f"Cannot resume: {file} is missing or damaged; start over elsewhere.") from None


def compare_runs(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise SettingError at the first thing in which the run to resume was another one."""
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            compare_runs(folder, old, new)
        elif old != new:
            raise SettingError(
                f"Cannot resume the run in {folder}: its {key} was {old!r}, now it is {new!r}; "
                "give the same arguments, or start over with --force."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
