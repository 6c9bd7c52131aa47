"""What the processes of one piece of work and the one that started them tell each other."""

import multiprocessing as std_mp
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import multiprocessing as mp

from encoderguard.errors import EncoderGuardError, RunError
from encoderguard.run import Progress, Run, Stopped, StopSignal

__all__ = ["START", "Found", "Relay", "Sender", "SharedStop", "portable", "share_by_name"]

# The processes are forked from a server that has imported what they need and has no threads: importing takes
# longer than many a training step, and once is enough.
START: Literal["forkserver", "spawn"] = "spawn" if sys.platform == "win32" else "forkserver"
_POLL = 0.1  # seconds between looks at the processes' messages


class Found:
    """What has come from the processes so far."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.outcome: Any = None


class Relay:
    """What the processes have in common with the one that started them."""

    def __init__(self) -> None:
        context = mp.get_context(START)
        self.messages: Any = context.SimpleQueue()
        self.stop, self.taken = context.Event(), context.Event()

    @contextmanager
    def served(self, run: Run) -> Iterator[Found]:
        """Pass progress on to ``run`` and its stop signal to the processes; collect what they send."""
        found, over = Found(), threading.Event()

        def serve() -> None:
            progress: Progress | None = run.progress
            while not over.is_set():
                try:
                    self._drain(found, progress)
                except Exception as error:  # whoever reads the progress failed
                    found.errors.append(error)
                    progress = None
                    self.stop.set()
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
            server.join()
            self._drain(found, None)
            for process in set(std_mp.active_children()) - others:  # only after a second Ctrl-C or an error
                process.kill()
                process.join()

    def _drain(self, found: Found, progress: Progress | None) -> None:
        while not self.messages.empty():
            kind, content = self.messages.get()
            if kind == "error":
                found.errors.append(content)
            elif kind == "outcome":
                found.outcome = content
                self.taken.set()
            elif progress is not None:
                progress(*content)


class SharedStop(StopSignal):
    """Set in one process, seen in all."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether the user asked to stop."""
        return bool(self._event.is_set())


class Sender:
    """A ``Progress`` that is shown elsewhere."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """See Progress."""
        self.relay.messages.put(("progress", (task, done, total, note)))


def portable(error: BaseException) -> BaseException:
    """The error, or one that says the same and can be sent; its traceback becomes a note."""
    if isinstance(error, EncoderGuardError | Stopped):
        return error
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sent = MemoryError(text) if "OutOfMemory" in text or "MemoryError" in text else RunError(text)
    sent.add_note(traceback.format_exc())
    return sent


def share_by_name() -> None:
    """The other way needs an open file per tensor, and large encoders have more than a process may open."""
    mp.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
