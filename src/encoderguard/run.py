"""What a run brings to a method besides data: seed, device, precision, progress, checkpoints."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from encoderguard.errors import SettingError
from encoderguard.peers import ALONE, Peers
from encoderguard.random import Rng

__all__ = ["Precision", "Progress", "Run", "StopSignal", "Stopped", "resolve_device"]

Precision = Literal["bf16", "float32"]


class Stopped(KeyboardInterrupt):
    """The user asked to stop; everything up to the last checkpoint is kept."""


class Progress(Protocol):
    """Shows how far a named task is."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` steps of ``task``; ``note`` is a short text such as a loss."""


def _silent(task: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


@dataclass
class StopSignal:
    """Set by the first Ctrl-C; loops look at it between steps, so no step is cut in half."""

    requested: bool = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into ``requested``; a second one interrupts at once."""

        def handle(signum: int, frame: object) -> None:
            if self.requested:
                raise Stopped
            self.requested = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` (an accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        SettingError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"The device '{name}' is not available here: {str(error).splitlines()[0]}"
        ) from None
    return device


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and capabilities()


@dataclass(frozen=True, kw_only=True)
class Run:
    """The surroundings of one run. ``Run(rng=Rng(0))`` is a silent float-or-bf16 run on the CPU."""

    rng: Rng
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision | Literal["auto"] = "auto"
    progress: Progress = _silent
    checkpoint: Path | None = None
    """Where long training keeps its state; None keeps none."""
    resume: bool = False
    """Continue from ``checkpoint`` if it exists."""
    stop: StopSignal = field(default_factory=StopSignal)
    peers: Peers = ALONE
    """The processes that train together; each has a run of its own."""

    @property
    def low_precision(self) -> bool:
        """Whether the bulk of the arithmetic runs in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and _bf16_pays(self.device))

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 autocast where it pays, else nothing."""
        if self.low_precision:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def silent(self) -> "Run":
        """The same surroundings without a reader of progress and without anybody who could stop it."""
        return replace(self, progress=_silent, stop=StopSignal())

    def child(self, *names: object) -> "Run":
        """The same surroundings with the random streams, and the checkpoint, of a named part."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = checkpoint.with_name(
                "-".join([checkpoint.stem, *map(str, names)]) + checkpoint.suffix
            )
        return replace(self, rng=self.rng.child(*names), checkpoint=checkpoint)

    def check_stop(self) -> None:
        """Raise Stopped if the user asked to stop."""
        if self.stop.requested:
            raise Stopped
