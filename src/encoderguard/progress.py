"""Progress on standard error: bars with an estimate in a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBars"]

_LINE_EVERY = 20.0  # seconds between lines in a log


@final
class ProgressBars:
    """A ``Progress`` for ``Run``; a context manager, so that the bars go away before anything is printed."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, tuple[float, float, int, int]] = {}

    def __enter__(self) -> "ProgressBars":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` steps of ``task``; a number that falls starts the task anew."""
        if self._console.is_terminal:
            self._draw(task, done, total, note)
        else:
            self._write(task, done, total, note)

    def _draw(self, task: str, done: int, total: int, note: str) -> None:
        known = self._tasks.get(task)
        if known is not None and self._bars.tasks[known].completed > done:
            self._bars.reset(known)
        if known is None:
            known = self._tasks[task] = self._bars.add_task(task, total=total, note=note)
        shown = note or self._bars.tasks[known].fields["note"]
        self._bars.update(known, completed=done, total=total, note=shown, visible=done < total)

    def _write(self, task: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        began, last, first, before = self._lines.get(task, (now, now, done, done))
        if done < before:
            began, last, first = now, now, done
        self._lines[task] = (began, last, first, done)
        if now - last < _LINE_EVERY or done <= first:
            return
        left = (now - began) / (done - first) * (total - done)
        text = f"{task}: {done}/{total}, about {left / 60:.0f} min left" + (f", {note}" if note else "")
        print(text, file=sys.stderr, flush=True)
        self._lines[task] = (began, now, first, done)
