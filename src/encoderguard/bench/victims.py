"""Encoders of a zoo as the cells that a bench starts from, instead of training and attacking anew."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderguard.bench.plan import NONE, Cell
from encoderguard.bench.suite import Choice, Suite, Task
from encoderguard.errors import SettingError
from encoderguard.zoo import Entry, Manifest, read_manifest

__all__ = ["Victim", "victims_in"]


@dataclass(frozen=True, kw_only=True)
class Victim:
    """One encoder of a zoo beside the clean one that it is compared with."""

    facts: dict[str, Any]
    seed: int
    clean: Cell
    suspect: Cell
    """The clean cell itself where nothing was attacked."""
    task: Task
    """Downstream, with the class that was aimed at."""


def victims_in(
    folder: Path,
    suite: Suite,
    tasks: tuple[Task, ...],
    missing: Callable[[str], object],
    *,
    only: tuple[str, ...] = (),
) -> Iterator[Victim]:
    """The encoders of a zoo that a suite asks for.

    Args:
        folder: of the zoo, with its manifest.
        suite: its pre-training methods and attacks are looked for; an attack's settings must be the zoo's.
        tasks: the size's; an encoder whose downstream set is none of them is left out.
        missing: told in words what the zoo does not have.
        only: names of the encoders to take; all that fit by default.

    Raises:
        UsageError: the folder holds no zoo, or the zoo no encoder of a name.
    """
    manifest = read_manifest(folder)
    for name in only:
        if manifest.entry(name) is None:
            raise SettingError(
                f"The zoo {folder} has no encoder '{name}'; see 'encoderguard zoo list {folder}'."
            )
    for pretrain in suite.pretrains:
        for attack in suite.attacks:
            found = [e for e in manifest.cells if _fits(e, pretrain, attack) and (not only or e.name in only)]
            if not found:
                missing(f"{attack.title} on {pretrain}: not run, the zoo {manifest.name} has none")
            for entry in found:
                task = _task_of(entry, tasks)
                if task is None:
                    missing(
                        f"{entry.name}: not run, its task {entry.downstream.get('test')} is not asked for"
                    )
                else:
                    yield _victim(folder, manifest, entry, attack, task)


def _fits(entry: Entry, pretrain: str, attack: Choice) -> bool:
    wanted = None if attack.name == NONE else attack.name
    same = all(entry.settings.get(name) == value for name, value in attack.settings.items())
    return entry.status == "built" and entry.attack == wanted and entry.pretrain == pretrain and same


def _task_of(entry: Entry, tasks: tuple[Task, ...]) -> Task | None:
    for task in tasks:
        if task.train == entry.downstream.get("train"):
            return task if entry.target is None else task.model_copy(update={"target": entry.target})
    return None


def _victim(folder: Path, manifest: Manifest, entry: Entry, attack: Choice, task: Task) -> Victim:
    suspect = _adopted(folder, manifest, entry)
    original = manifest.entry(entry.clean) if entry.clean else None
    clean = suspect if original is None else _adopted(folder, manifest, original)
    facts = {"pretrain": entry.pretrain, "attack": attack.title, "task": task.name, "seed": entry.seed}
    return Victim(
        facts=facts | {"victim": entry.name}, seed=entry.seed, clean=clean, suspect=suspect, task=task
    )


def _adopted(folder: Path, manifest: Manifest, entry: Entry) -> Cell:
    """A cell that copies the files of the zoo; they are its only inputs, by their digests."""
    files = {"encoder": entry.bundle, "trigger": entry.trigger_file}
    digests = {"encoder": entry.bundle_sha256, "trigger": entry.trigger_sha256}
    return Cell(
        job="adopt",
        method=entry.attack or entry.pretrain,
        settings={},
        seed=entry.seed,
        data={role: str(folder / name) for role, name in files.items() if name},
        digests={role: digest for role, digest in digests.items() if digest},
        extra={"zoo": manifest.name, "entry": entry.name},
    )
