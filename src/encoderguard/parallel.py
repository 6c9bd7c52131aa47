"""One piece of work on several devices of this machine: Fabric starts a process for each and connects them.

The processes run the same work, each with its own ``run.peers``; the first one shows progress, writes checkpoints
and hands its result back. What goes to and fro is sent between processes of one program, never read from a file.
"""

import logging
import multiprocessing as std_mp
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import multiprocessing as mp
from torch import nn

from encoderguard.errors import EncoderGuardError, RunError, SettingError
from encoderguard.peers import Peers
from encoderguard.run import Progress, Run, Stopped, StopSignal

__all__ = ["Outcome", "spread"]

_POLL = 0.1  # seconds between looks at the processes' messages
_HANDOVER = 600.0  # seconds that the first process waits until its result was taken
_MARKS = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")  # what Fabric leaves behind
T = TypeVar("T")


class Outcome(Generic[T]):
    """What the first process found."""

    def __init__(self, result: T, device_memory: int | None) -> None:
        self.result = result
        self.device_memory = device_memory
        """Largest amount of accelerator memory held by its tensors, in bytes; None on the CPU."""


def spread(work: Callable[..., T], *args: Any, run: Run, devices: int, **kwargs: Any) -> Outcome[T]:
    """``work(*args, run=..., **kwargs)`` in one process per device, on the first ``devices`` of the run's kind.

    Args:
        work: a method of a module that every process can import; so must be the classes of its arguments.
        args: copied into the processes; tensors are shared and must not be written to.
        run: surroundings; its progress and its stop signal serve all processes.
        devices: 2 or more.
        kwargs: as ``args``.

    Returns:
        The first process's result. Networks in it, also as fields of a dataclass, are on the run's device.

    Raises:
        SettingError: there are not so many devices, or an argument cannot be handed to another process.
        Stopped: the user asked to stop.
        EncoderGuardError: what ``work`` raised.
        RunError: a process failed or ended otherwise.
    """
    fabric = _fabric(run.device, devices)
    link = _Link()
    with _surroundings(), link.served(run) as found:
        try:
            fabric.launch(_process, _Task(link, work, args, kwargs, run.silent()))
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            link.drain(found)
            if run.stop.requested and not found.errors:
                raise Stopped from None
            if not found.errors:
                raise _lost(error) from error
        except (AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise _not_started(error) from error
    if found.errors:
        raise found.errors[0]
    if found.outcome is None:
        raise RunError("The processes ended without a result.")
    return _moved(found.outcome, run.device)


def _fabric(device: torch.device, devices: int) -> Fabric:
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise SettingError(
            f"Several devices are the CPU's processes or the first GPUs, found the device '{device}'; "
            "give cpu or cuda."
        )
    there = torch.cuda.device_count()
    if device.type == "cuda" and there < devices:
        raise SettingError(f"{devices} devices were asked for, but this machine has {there} of the kind cuda.")
    # which parameters take part does not change during a training; some (an unused head) never do
    strategy = _Quiet(
        cluster_environment=LightningEnvironment(),
        start_method="spawn",
        static_graph=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an idle GPU beside --device cpu is what was asked for
        return Fabric(accelerator=device.type, devices=devices, strategy=strategy)


class _Quiet(DDPStrategy):
    """Data parallel without a banner on standard error."""

    def setup_environment(self) -> None:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        super().setup_environment()


class _Found:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.outcome: Outcome[Any] | None = None


class _Link:
    """What the processes have in common with the one that started them."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.messages: Any = context.SimpleQueue()
        self.stop, self.taken = context.Event(), context.Event()
        self.parent = os.getpid()

    @contextmanager
    def served(self, run: Run) -> Iterator[_Found]:
        """Pass progress on to ``run`` and its stop signal to the processes; collect what they send."""
        found, over = _Found(), threading.Event()

        def serve() -> None:
            while not over.is_set():
                self.drain(found, run.progress)
                if run.stop.requested:
                    self.stop.set()
                time.sleep(_POLL if self.messages.empty() else 0)

        others = set(std_mp.active_children())
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            yield found
        finally:
            over.set()
            server.join(timeout=10)
            for process in set(std_mp.active_children()) - others:  # only after a second Ctrl-C or an error
                process.kill()
                process.join()

    def drain(self, found: _Found, progress: Progress | None = None) -> None:
        """Take all messages that have come."""
        while not self.messages.empty():
            kind, content = self.messages.get()
            if kind == "error":
                found.errors.append(content)
            elif kind == "outcome":
                found.outcome = content
                self.taken.set()
            elif progress is not None:
                progress(*content)


class _Task:
    """Everything a process needs, in one object that Fabric does not look into."""

    def __init__(
        self, link: _Link, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Run
    ) -> None:
        self.link, self.work, self.args, self.kwargs, self.run = link, work, args, kwargs, run


class _SharedStop(StopSignal):
    """Set in one process, seen in all."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return bool(self._event.is_set())


def _process(fabric: Fabric, task: _Task) -> None:
    """One of the processes."""
    link, first = task.link, fabric.global_rank == 0

    def interrupted(signum: int, frame: object) -> None:
        if os.getppid() != link.parent:  # sent by the system because the parent is gone
            os._exit(1)

    signal.signal(signal.SIGINT, interrupted)  # Ctrl-C is for the parent to pass on
    mp.set_sharing_strategy("file_system")  # the other one needs an open file per tensor
    if not first:
        warnings.simplefilter("ignore")
        logging.disable()
    run = replace(
        task.run,
        device=fabric.device,
        progress=_Sender(link) if first else task.run.progress,
        stop=_SharedStop(link.stop),
        peers=Peers(fabric.global_rank, fabric.world_size, fabric),
    )
    try:
        result = task.work(*task.args, run=run, **task.kwargs)
        if first:
            cuda = run.device.type == "cuda"
            memory = torch.cuda.max_memory_allocated(run.device) if cuda else None
            link.messages.put(("outcome", _moved(Outcome(result, memory), torch.device("cpu"))))
            link.taken.wait(_HANDOVER)  # tensors live as long as their process
        fabric.barrier()
        torch.distributed.destroy_process_group()
    except BaseException as error:
        link.messages.put(("error", _portable(error)))
        os._exit(1)  # at once: the others wait in vain, and the parent ends them


class _Sender:
    def __init__(self, link: _Link) -> None:
        self.link = link

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.link.messages.put(("progress", (task, done, total, note)))


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same and can be sent; its traceback becomes a note."""
    if isinstance(error, EncoderGuardError | Stopped):
        return error
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sent = MemoryError(text) if "OutOfMemory" in text or "MemoryError" in text else RunError(text)
    sent.add_note(traceback.format_exc())
    return sent


def _lost(error: Exception) -> RunError:
    return RunError(
        f"A process of several devices ended without a word ({' '.join(str(error).split())[:200]}); a script must "
        "start such work below `if __name__ == '__main__':`, and shared memory (/dev/shm) must hold the images."
    )


def _not_started(error: Exception) -> EncoderGuardError:
    text = " ".join(str(error).split())
    if "pickle" in text:
        return SettingError(
            f"What several devices share must be defined in a module that can be imported: {text[:300]}."
        )
    return RunError(f"The processes of several devices could not be started: {text[:300]}.")


def _moved(outcome: Outcome[T], device: torch.device) -> Outcome[T]:
    """The outcome with its networks on ``device``."""
    result: Any = outcome.result
    if isinstance(result, nn.Module):
        result.to(device)
    elif is_dataclass(result):
        for field in fields(result):
            if isinstance(value := getattr(result, field.name), nn.Module):
                value.to(device)
    return outcome


@contextmanager
def _surroundings() -> Iterator[None]:
    """The environment and the way tensors are shared, put back afterwards."""
    marks = {name: os.environ.get(name) for name in _MARKS}
    strategy = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    for name in _MARKS:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        mp.set_sharing_strategy(strategy)
        for name, value in marks.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
