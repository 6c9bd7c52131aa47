"""Writing files so that a reader sees the old one, the new one, or none - never half of one."""

import errno
import os
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from encoderguard.errors import EncoderGuardError, OutputError, StorageError

__all__ = ["FolderLock", "prepare_folder", "translated", "write_atomic", "write_text"]

_ROOM = 1 << 20
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def translated(error: OSError, path: Path) -> EncoderGuardError:
    """What went wrong in writing, as one sentence: StorageError if it was the disk, else OutputError."""
    reason = error.strerror or str(error)
    if error.errno in _STORAGE_ERRNOS:
        return StorageError(
            f"Could not store {path}: {reason}. Nothing was changed; free space and run again."
        )
    return OutputError(f"Cannot write {path}: {reason}. Choose a path that can be written with --out.")


def prepare_folder(path: Path) -> Path:
    """Make ``path`` a folder that can be written, before any work is spent on it.

    Raises:
        OutputError: it is a file, or writing there is not allowed.
        StorageError: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            pass
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"The output {path} must be a folder, but a file of that name exists.") from None
    except OSError as error:
        raise translated(error, path) from error
    return path


class FolderLock:
    """Nobody else holds the folder until ``release``, or until the process ends, however that happens.

    On systems and disks without such locks nothing is held.

    Raises:
        OutputError: somebody holds it; ``refusal`` is what is said.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self.release: Callable[[], object] = lambda: None
        if sys.platform == "win32":
            return
        import fcntl

        handle = os.open(path, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise OutputError(refusal) from None
        except OSError:  # the disk has no locks
            pass


def write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    Raises:
        OutputError: writing there is not allowed.
        StorageError: the disk is full or failed; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; some libraries make their files private
        try:
            write(temporary)
        except OSError:
            raise
        except Exception:  # torch and safetensors have errors of their own for a full disk
            _check_room(temporary)
            raise
        temporary.chmod(mode)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise translated(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check_room(path: Path) -> None:
    """Raises OSError if no more can be written to the file."""
    with path.open("ab") as stream:
        stream.write(bytes(_ROOM))
        os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically. Raises as ``write_atomic``."""
    return write_atomic(path, lambda temporary: _fill(temporary, text))


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
