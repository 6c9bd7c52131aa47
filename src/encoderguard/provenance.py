"""Facts about the machine, the libraries and the source that a run used."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["commit", "cpu_name", "forget_peak_memory", "peak_memory_bytes", "source_facts", "versions"]

_PACKAGES = ("torch", "torchvision", "timm", "lightly", "kornia", "numpy", "scikit-learn", "safetensors")


@functools.cache
def versions() -> dict[str, str]:
    """Python, EncoderGuard and the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for name in ("encoderguard", *_PACKAGES):
        try:
            # A loaded module also tells how it was built, as in 2.11.0+cu130.
            found[name] = str(getattr(sys.modules.get(name), "__version__", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_facts() -> dict[str, Any]:
    """The machine and source fields of a record."""
    revision, dirty = commit()
    return {
        "versions": dict(versions()),
        "commit": revision,
        "dirty": dirty,
        "platform": platform.platform(),
        "cpu": cpu_name(),
    }


@functools.cache
def commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from, and whether the package differs from it."""
    package = Path(__file__).resolve().parent
    if not (package.parents[1] / ".git").exists():  # installed: whatever repository lies above is not ours
        return None, None
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    return revision, None if revision is None or changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def cpu_name() -> str | None:
    """The processor's model, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def forget_peak_memory() -> None:
    """From here on ``peak_memory_bytes`` counts anew, on Linux: a worker does many jobs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process since ``forget_peak_memory``; None where none is told."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
