"""Builds a zoo: every cell of a recipe once, in order of what needs what, whatever happens on the way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from encoderguard.errors import EncoderGuardError, ImageError, SettingError
from encoderguard.jobs.options import JobOptions
from encoderguard.run import Progress, Stopped, StopSignal
from encoderguard.storage import FolderLock, prepare_folder
from encoderguard.zoo.cells import Maker, Site
from encoderguard.zoo.entries import failed_entry
from encoderguard.zoo.estimate import cost, needed_sets
from encoderguard.zoo.manifest import MANIFEST, Entry, Manifest, read_manifest, write_manifest
from encoderguard.zoo.recipe import Cell, ZooRecipe
from encoderguard.zoo.standing import stands
from encoderguard.zoo.workers import Crew, attempt, one_thread

__all__ = ["build_zoo"]


def build_zoo(
    recipe: ZooRecipe,
    site: Site,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Make what is missing of a zoo, and its manifest.

    Args:
        recipe: the cells.
        site: folders, image sets and device.
        jobs: cells to make at the same time, each in a process with one thread.
        progress: shows how far each training is.
        stop: set it to stop between two steps; the next build continues.
        tell: takes a line when a cell is done.

    Raises:
        SettingError: ``jobs`` is below 1.
        ImageError: an image set is not there.
        OutputError: a folder cannot be written, or another build is at work in it.
        Stopped: the user asked to stop.
    """
    if jobs < 1:
        raise SettingError(f"The number of jobs must be at least 1, found {jobs}.")
    cells, stop = recipe.cells(), stop or StopSignal()
    problems = site.pictures.missing(needed_sets(cells))
    if problems:
        raise ImageError(problems[0])
    prepare_folder(site.zoo)
    prepare_folder(site.build)
    with _alone(site.build), one_thread():
        builder = _Builder(recipe, site, cells, jobs, tell)
        if jobs == 1:
            builder.alone({"progress": progress, "stop": stop}, stop)
        else:
            with Crew(site, jobs, progress) as crew:
                builder.together(crew, stop)
        return builder.write(final=True)


class _Builder:
    """Keeps account of what is done."""

    def __init__(
        self, recipe: ZooRecipe, site: Site, cells: list[Cell], jobs: int, tell: Callable[[str], None]
    ) -> None:
        self.recipe, self.site, self.cells, self.tell = recipe, site, cells, tell
        self.done: dict[str, Entry] = {}
        self._before = _known(site.zoo)
        self._weights = {cell.name: cost(cell) for cell in cells}
        self._began, self._jobs = datetime.now(UTC), jobs
        self._seconds, self._worked = 0.0, 0.0

    def alone(self, options: JobOptions, stop: StopSignal) -> None:
        """One cell after the other in this process."""
        for cell in self.cells:
            if stop.requested:
                raise Stopped
            entry = self._without_work(cell)
            self._account(cell, entry or attempt(self.site, cell, options), worked=entry is None)

    def together(self, crew: Crew, stop: StopSignal) -> None:
        """Several at once; a cell starts when its clean encoder is there."""
        waiting, named = list(self.cells), {cell.name: cell for cell in self.cells}
        looked: set[str] = set()
        while waiting or crew.busy:
            if stop.requested:
                raise Stopped
            for cell in [cell for cell in waiting if cell.clean is None or cell.clean in self.done]:
                entry = None if cell.name in looked else self._without_work(cell)
                looked.add(cell.name)
                if entry is not None:
                    self._account(cell, entry, worked=False)
                elif crew.full:
                    continue
                else:
                    crew.start(cell)
                waiting.remove(cell)
            for entry in crew.finished(0.2) if crew.busy else ():
                self._account(named[entry.name], entry, worked=True)

    def write(self, *, final: bool = False) -> Manifest:
        """The manifest of what is known; until the end also of what an earlier build made."""
        known: Mapping[str, Entry] = self.done if final else self._before | self.done
        entries = [known[cell.name] for cell in self.cells if cell.name in known]
        manifest = Manifest(name=self.recipe.name, title=self.recipe.title, cells=entries)
        return write_manifest(manifest, self.site.zoo)

    def _without_work(self, cell: Cell) -> Entry | None:
        if cell.clean is not None and self.done[cell.clean].status == "failed":
            maker = Maker(self.site, cell)
            maker.files.remove()
            return failed_entry(cell, f"Its clean encoder {cell.clean} failed.")
        try:
            maker = Maker(self.site, cell)
            return maker.kept() or self._standing(maker)
        except EncoderGuardError:  # something of it cannot be read: make it anew, and report what fails then
            return None

    def _standing(self, maker: Maker) -> Entry | None:
        """What the zoo holds of a cell whose jobs are not here, if that is what the recipe asks for."""
        cell = maker.cell
        entry = self._before.get(cell.name)
        if entry is None or any(maker.folder.glob("*")):
            return None
        if cell.clean is not None:  # the attack must have started from the clean encoder that is here now
            known = self._before.get(cell.clean)
            if known is None or self.done[cell.clean].fingerprint != known.fingerprint:
                return None
        return entry if stands(maker, entry) else None

    def _account(self, cell: Cell, entry: Entry, *, worked: bool) -> None:
        self.done[cell.name] = entry
        state = "kept"
        if worked and entry.status == "built":
            seconds = (entry.run["training_seconds"] or 0.0) + (entry.run["evaluation_seconds"] or 0.0)
            here = datetime.fromisoformat(entry.run["created"]) >= self._began.replace(microsecond=0)
            state = _duration(seconds) if here else "trained before, measured now"
            if here:
                self._seconds, self._worked = self._seconds + seconds, self._worked + self._weights[cell.name]
        self.write()
        number = f"[{len(self.done)}/{len(self.cells)}]"
        self.tell(f"{number} {_described(entry, state)}{self._left()}")

    def _left(self) -> str:
        rest = sum(weight for name, weight in self._weights.items() if name not in self.done)
        if not rest or not self._worked:
            return ""
        return f"; about {_duration(self._seconds / self._worked * rest / self._jobs)} left"


def _described(entry: Entry, state: str) -> str:
    if entry.status == "failed":
        return f"{entry.name} failed: {str(entry.error).rstrip('.')}"
    numbers = [("ACC", entry.acc), ("ASR", entry.asr), ("clean ASR", entry.clean_asr)]
    shown = ", ".join(f"{name} {value:.1%}" for name, value in numbers if value is not None)
    return f"{entry.name}: {shown} ({state})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _known(zoo: Path) -> dict[str, Entry]:
    try:
        return {entry.name: entry for entry in read_manifest(zoo).cells} if (zoo / MANIFEST).exists() else {}
    except EncoderGuardError:
        return {}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second build in the same folder."""
    refusal = f"Another build is at work in {folder}; wait for it, or choose another folder with --build."
    lock = FolderLock(folder, refusal)
    try:
        yield
    finally:
        lock.release()
