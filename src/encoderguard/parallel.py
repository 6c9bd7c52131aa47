"""One piece of work on several devices of this machine: Fabric starts a process for each and connects them.

The processes run the same work, each with its own ``run.peers``; the first one shows progress, writes
checkpoints and hands its result back. What goes to and fro stays between the processes of one program:
nothing is read from a file.
"""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from multiprocessing import forkserver
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from encoderguard.errors import EncoderGuardError, RunError, SettingError
from encoderguard.peers import Peers
from encoderguard.provenance import peak_memory_bytes
from encoderguard.relay import START, Relay, Sender, SharedStop, portable, share_by_name
from encoderguard.run import Run, Stopped

__all__ = ["Outcome", "spread"]

_HANDOVER = 600.0  # seconds that the first process waits until its result was taken
_PRELOADED = ("encoderguard.parallel", "encoderguard.training", "lightly.models.modules")
_MARKS = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")  # what Fabric leaves behind
T = TypeVar("T")


class Outcome(Generic[T]):
    """What the first process found."""

    def __init__(self, result: T, device_memory: int | None) -> None:
        self.result = result
        self.memory = peak_memory_bytes()
        """Largest resident size of the process, in bytes."""
        self.device_memory = device_memory
        """Largest amount of accelerator memory held by its tensors, in bytes; None on the CPU."""


def spread(work: Callable[..., T], *args: Any, run: Run, devices: int, **kwargs: Any) -> Outcome[T]:
    """``work(*args, run=..., **kwargs)`` in one process per device, of the run's kind of device.

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
    relay, lost = Relay(), None
    with _surroundings(work), relay.served(run) as found:
        try:
            process: Callable[..., None] = _process
            fabric.launch(process, _Task(relay, work, args, kwargs, run.silent()))
        except (ProcessExitedException, ProcessRaisedException) as error:
            lost = error
        except (AttributeError, EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise _not_started(error) from error
    if found.errors:
        raise found.errors[0]
    if lost is not None and run.stop.requested:  # Ctrl-C reached a process before it could listen
        raise Stopped
    if lost is not None or found.outcome is None:
        raise _lost(lost) from lost
    return _moved(found.outcome, run.device)


def _fabric(device: torch.device, devices: int) -> Fabric:
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise SettingError(
            f"Several devices are the CPU's processes or the first GPUs, found the device '{device}'; "
            "give cpu or cuda."
        )
    there = torch.cuda.device_count()
    if device.type == "cuda" and there < devices:
        raise SettingError(
            f"{devices} devices were asked for, but this machine has {there} of the kind cuda."
        )
    # which parameters take part does not change during a training; some (an unused head) never do
    strategy = _Quiet(cluster_environment=LightningEnvironment(), start_method=START, static_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an idle GPU beside --device cpu is what was asked for
        return Fabric(accelerator=device.type, devices=devices, strategy=strategy)


class _Quiet(DDPStrategy):
    """Data parallel without a banner on standard error."""

    def setup_environment(self) -> None:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        super().setup_environment()


class _Task:
    """Everything a process needs, in one object that Fabric does not look into."""

    def __init__(
        self, relay: Relay, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Run
    ) -> None:
        self.relay, self.work, self.args, self.kwargs, self.run = relay, work, args, kwargs, run


def _process(fabric: Fabric, task: _Task) -> None:
    """One of the processes."""
    relay, first, parent = task.relay, fabric.global_rank == 0, os.getppid()

    def interrupted(signum: int, frame: object) -> None:
        if os.getppid() != parent:  # sent by the system because the parent is gone
            os._exit(1)

    signal.signal(signal.SIGINT, interrupted)  # Ctrl-C is for the parent to pass on
    share_by_name()
    if not first:
        warnings.simplefilter("ignore")
        logging.disable()
    run = replace(
        task.run,
        device=fabric.device,
        progress=Sender(relay) if first else task.run.progress,
        stop=SharedStop(relay.stop),
        peers=Peers(fabric.global_rank, fabric.world_size, fabric),
    )
    try:
        result = task.work(*task.args, run=run, **task.kwargs)
        if first:
            cuda = run.device.type == "cuda"
            memory = torch.cuda.max_memory_allocated(run.device) if cuda else None
            relay.messages.put(("outcome", _moved(Outcome(result, memory), torch.device("cpu"))))
            relay.taken.wait(_HANDOVER)  # tensors live as long as their process
        fabric.barrier()
        torch.distributed.destroy_process_group()
    except BaseException as error:
        relay.messages.put(("error", portable(error)))
        os._exit(1)  # at once: the others wait in vain, and the parent ends them


def _lost(error: Exception | None) -> RunError:
    return RunError(
        f"A process of several devices ended without a word ({' '.join(str(error).split())[:200]}); "
        "it may have run out of memory, or of room for the images in /dev/shm."
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
def _surroundings(work: Callable[..., Any]) -> Iterator[None]:
    """The environment and the way tensors are shared, put back afterwards."""
    marks = {name: os.environ.get(name) for name in _MARKS}
    strategy = str(mp.get_sharing_strategy())  # type: ignore[no-untyped-call]
    share_by_name()
    logger = logging.getLogger("torch.multiprocessing.spawn")  # says that it ends the others after an error
    level = logger.level
    logger.setLevel(logging.ERROR)
    for name in _MARKS:
        os.environ.pop(name, None)
    if START == "forkserver":
        _start_server(work.__module__)
    try:
        yield
    finally:
        mp.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
        logger.setLevel(level)
        for name, value in marks.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start_server(module: str) -> None:
    """Unless it runs already. It and what it forks are deaf to Ctrl-C from the start."""
    forkserver.set_forkserver_preload([*_PRELOADED, module])
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
