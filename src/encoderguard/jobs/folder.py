"""The folder of one run: refused if occupied, resumable while unfinished, and never left half-written."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from encoderguard.errors import EncoderGuardError, OutputError, SettingError, UsageError
from encoderguard.results import RESULT, Record, read_record, write_record
from encoderguard.storage import prepare_folder, write_text
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


class RunFolder:
    """A folder that is prepared before any work and filled after it.

    Raises:
        OutputError: it cannot be written, or holds a run and neither ``resume`` nor ``overwrite`` is set.
        SettingError: ``resume`` is set and there is nothing to resume.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.resume = path, resume
        self._check_free(overwrite)
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._stored: list[Path] = []
        try:
            prepare_folder(path)
        except EncoderGuardError:
            self._remove_made()
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
            _compare(self.path, _read_identity(file), json.loads(json.dumps(identity)))
        else:
            for old in self.checkpoints():
                old.unlink()
            write_text(file, json.dumps(identity, indent=2) + "\n")

    def store(self, outputs: Mapping[str, Callable[[Path], object]]) -> dict[str, str]:
        """Write the files of a finished run in place of older ones; file name to sha256.

        Raises:
            OutputError: a file cannot be written.
            StorageError: the disk is full; the files written so far are removed.
        """
        self._clear()
        digests = {}
        for name, write in outputs.items():
            self._stored.append(self.path / name)
            write(self.path / name)
            digests[name] = _sha256(self.path / name)
        return digests

    def finish(self, record: Record) -> None:
        """Write the record, after which nothing needs to be resumed."""
        self._stored.append(self.path / RESULT)
        write_record(record, self.path)
        for leftover in (*self.checkpoints(), self.path / _IDENTITY):
            leftover.unlink(missing_ok=True)

    def fail(self, record: Record) -> None:
        """Remove what a failed run stored and leave its record, if the disk lets us."""
        with contextlib.suppress(EncoderGuardError, OSError):  # the first error is the one to report
            self._clear()
            if not self.checkpoints():
                (self.path / _IDENTITY).unlink(missing_ok=True)
            write_record(record, self.path)

    def abandon(self) -> None:
        """Leave no trace of a run that could not start."""
        for path in self._stored:
            path.unlink(missing_ok=True)
        if not self.resume and not self.checkpoints():
            (self.path / _IDENTITY).unlink(missing_ok=True)
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # they are not empty
            for folder in self._made:
                folder.rmdir()

    def _clear(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def _check_free(self, overwrite: bool) -> None:
        unfinished = bool(self.checkpoints())
        if self.resume:
            if not unfinished:
                raise SettingError(
                    f"There is nothing to resume in {self.path}, it holds no checkpoint; "
                    "run the command without --resume."
                )
        elif not overwrite and unfinished:
            raise OutputError(
                f"{self.path} holds an unfinished run; continue it with --resume, discard it with --force, "
                "or choose another folder with --out."
            )
        elif not overwrite and self._occupied():
            raise OutputError(
                f"{self.path} holds a finished run; choose another folder with --out, "
                "or replace the run with --force."
            )

    def _occupied(self) -> bool:
        if any((self.path / name).exists() for name in _FILES if name != RESULT):
            return True
        if not (self.path / RESULT).exists():
            return False
        try:
            return read_record(self.path).status == "success"
        except UsageError:  # not one of our failed runs: somebody's file
            return True


def _read_identity(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise SettingError(f"Cannot resume: {file} is missing or damaged; start over with --force.") from None


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(folder, old, new)
        elif old != new:
            raise SettingError(
                f"Cannot resume the run in {folder}: its {key} was {old!r}, now it is {new!r}; "
                "give the same arguments, or start over with --force."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
