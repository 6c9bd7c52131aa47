"""From a suite and a size to a plan: which cells, and which rows show them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from encoderguard.bench.plan import CLEAN, NONE, Cell, Job, Plan, Row
from encoderguard.bench.suite import Choice, Size, Suite, Task
from encoderguard.bench.victims import victims_in
from encoderguard.errors import ImageError, SettingError
from encoderguard.methods import DataPoisoning, EncoderAttack
from encoderguard.registry import Family, create, method_class, method_names

__all__ = ["make_plan"]

Digest = Callable[[str], str]
"""The content digest of an image spec; raises ImageError if it cannot be had."""


def make_plan(suite: Suite, size: Size, name: str, *, digest: Digest) -> Plan:
    """The plan of a suite.

    Args:
        suite: already ``sized``.
        size: data and lengths.
        name: of the size.
        digest: reads an image set and gives its digest.

    Raises:
        SettingError: the suite or the size names a method, setting or task that is not known.
        ImageError: the pre-training images cannot be had.
    """
    return _Planner(suite, size, digest).plan(name)


class _Planner:
    def __init__(self, suite: Suite, size: Size, digest: Digest) -> None:
        self.size, self.digest = size, digest
        self.rows: list[Row] = []
        self.missing: list[str] = []
        self.suite = self._possible(suite)
        _check_settings(size)

    def plan(self, name: str) -> Plan:
        tasks = [task for task in self._tasks() if self._available(task)]
        if self.size.zoo is not None:
            self._of_zoo(Path(self.size.zoo), tuple(tasks))
            return self._made(name)
        for seed in self.size.seeds:
            for pretrain in self.suite.pretrains:
                for attack in self.suite.attacks:
                    for task in self._aimed(attack, tasks):
                        self._trained(seed, pretrain, attack, task)
        return self._made(name)

    def _made(self, name: str) -> Plan:
        return Plan(suite=self.suite, size=name, rows=tuple(self.rows), missing=tuple(self.missing))

    def _of_zoo(self, folder: Path, tasks: tuple[Task, ...]) -> None:
        for victim in victims_in(folder, self.suite, tasks, self.missing.append, only=self.size.victims):
            self._rows(victim.seed, victim.facts, victim.clean, victim.suspect, victim.task)

    def _possible(self, suite: Suite) -> Suite:
        """The suite without methods that are not registered; they are named as not run."""
        families: dict[str, Family] = {"attacks": "attack", "defenses": "defense", "detectors": "detector"}
        kept: dict[str, Any] = {}
        for field_name, family in families.items():
            known = {NONE, *method_names(family)}
            choices = getattr(suite, field_name)
            kept[field_name] = tuple(choice for choice in choices if choice.name in known)
            self.missing += [f"{c.title}: not run, no such {family}" for c in choices if c.name not in known]
        return suite.model_copy(update=kept)

    def _tasks(self) -> list[Task]:
        known = {task.name: task for task in self.size.tasks}
        wanted = self.suite.tasks or tuple(known)
        for task in wanted:
            if task not in known:
                raise SettingError(
                    f"The suite {self.suite.name} names the task '{task}'; the size has {', '.join(known)}."
                )
        return [known[task] for task in wanted]

    def _available(self, task: Task) -> bool:
        try:
            for spec in (task.train, task.test):
                self.digest(spec)
        except ImageError as error:
            self.missing.append(f"{task.name}: not run, {error}")
            return False
        return True

    def _aimed(self, attack: Choice, tasks: list[Task]) -> list[Task]:
        """A data poisoner aims at a class of the pre-training set itself."""
        if attack.name == NONE or issubclass(method_class("attack", attack.name), EncoderAttack):
            return [task for task in tasks if task.name != self.size.own_task] or tasks
        return [task for task in self.size.tasks if task.name == self.size.own_task and self._available(task)]

    def _trained(self, seed: int, pretrain: str, attack: Choice, task: Task) -> None:
        clean = self._pretrained(seed, pretrain, attack.architecture)
        suspect = self._attacked(seed, pretrain, attack, task, clean)
        facts = {"pretrain": pretrain, "attack": attack.title, "task": task.name, "seed": seed}
        if attack.x is not None:
            facts["x"] = attack.x
        self._rows(seed, facts, clean, suspect, task)

    def _rows(self, seed: int, facts: dict[str, Any], clean: Cell, suspect: Cell, task: Task) -> None:
        if self.suite.kind == "profile":
            cells = {"profile": self._profile(seed, suspect, self._trigger_of(suspect))}
            self.rows.append(Row(facts=facts, cells=cells))
        for detector in self.suite.detectors:
            for kind, encoder in (("clean", clean), ("backdoored", suspect)):
                scan = self._scanned(seed, encoder, detector)
                about = facts | {"detector": detector.title, "encoder": kind} | _place(detector)
                self.rows.append(Row(facts=about, cells={"scan": scan, "encoder": encoder}))
        if self.suite.maps:
            judged = self._judged(seed, clean, suspect, clean, task)
            self.rows.append(Row(facts=facts | {"defense": CLEAN}, cells={"evaluate": judged}))
        for defense in self.suite.defenses:
            trigger = self._trigger_of(suspect)
            purified = suspect if defense.name == NONE else self._purified(seed, suspect, defense, trigger)
            judged = self._judged(seed, purified, suspect, clean, task)
            about = facts | {"defense": defense.title} | _place(defense)
            cells = {"evaluate": judged} | ({} if defense.name == NONE else {"purify": purified})
            self.rows.append(Row(facts=about, cells=cells))

    def _cell(self, job: Job, family: Family, choice: Choice, seed: int, **fields: Any) -> Cell:
        shared = self.size.settings.get(f"{family}.{choice.name}", {})
        settings = create(family, choice.name, shared | choice.settings).settings()
        data = fields.pop("data", {})
        digests = {role: self.digest(spec) for role, spec in data.items()}
        return Cell(
            job=job, method=choice.name, settings=settings, seed=seed, data=data, digests=digests, **fields
        )

    def _pretrained(self, seed: int, method: str, architecture: str | None) -> Cell:
        size = self.size
        model = {name: getattr(size, name) for name in ("width", "stem", "normalisation")}
        model["architecture"] = architecture or size.architecture
        extra = {"count": size.pretrain_count, "image_size": size.image_size, **model}
        data = {"images": size.images}
        return self._cell("pretrain", "pretrain", Choice(name=method), seed, data=data, extra=extra)

    def _attacked(self, seed: int, pretrain: str, attack: Choice, task: Task, clean: Cell) -> Cell:
        if attack.name == NONE:
            return clean
        size, base = self.size, {"target": task.target, "image_size": self.size.image_size}
        if issubclass(method_class("attack", attack.name), DataPoisoning):
            extra = base | {"count": size.pretrain_count}
            data = {"images": task.train}
            poison = self._cell("poison", "attack", attack, seed, data=data, extra=extra)
            return replace(clean, needs={"images": poison}, data={}, digests={})
        extra = base | {"count": attack.count or size.shadow_count}
        data = {"images": size.images, "downstream": task.train}
        return self._cell("attack", "attack", attack, seed, needs={"encoder": clean}, data=data, extra=extra)

    def _purified(self, seed: int, suspect: Cell, defense: Choice, trigger: Cell | None) -> Cell:
        count = defense.count or round(self.size.clean_count * (defense.share or 1))
        extra: dict[str, Any] = {"count": count, "image_size": self.size.image_size}
        needs = {"encoder": suspect}
        if defense.stamped and trigger is not None:
            needs, extra = needs | {"trigger": trigger}, extra | {"stamped": defense.stamped}
        return self._cell(
            "purify", "defense", defense, seed, needs=needs, data=self._images(defense), extra=extra
        )

    def _images(self, choice: Choice) -> dict[str, str]:
        return {"images": self.size.images if choice.images == "own" else self.size.auxiliary}

    def _scanned(self, seed: int, encoder: Cell, detector: Choice) -> Cell:
        count = detector.count or round(self.size.scan_count * (detector.share or 1))
        extra = {"count": count, "image_size": self.size.image_size}
        needs, data = {"encoder": encoder}, self._images(detector)
        return self._cell("scan", "detector", detector, seed, needs=needs, data=data, extra=extra)

    def _judged(self, seed: int, encoder: Cell, suspect: Cell, clean: Cell, task: Task) -> Cell:
        """ACC and ASR; trigger and target come from the attack, which no detector or defense sees."""
        needs = {"encoder": encoder, "clean_encoder": clean}
        trigger = self._trigger_of(suspect)
        extra: dict[str, Any] = {"image_size": self.size.image_size}
        if trigger is not None:
            needs, extra = needs | {"trigger": trigger}, extra | {"target": task.target}
        return Cell(
            job="evaluate",
            method=self.size.probe,
            settings=self.size.probe_settings,
            seed=seed,
            needs=needs,
            data={"train": task.train, "test": task.test},
            digests={"train": self.digest(task.train), "test": self.digest(task.test)},
            extra=extra,
        )

    def _profile(self, seed: int, encoder: Cell, trigger: Cell | None) -> Cell:
        needs = {"encoder": encoder} | ({} if trigger is None else {"trigger": trigger})
        data = {"images": self.size.images}
        return Cell(
            job="profile",
            method="mine",
            settings={},
            seed=seed,
            needs=needs,
            data=data,
            digests={"images": self.digest(self.size.images)},
            extra={"count": min(self.size.clean_count, 1000), "image_size": self.size.image_size},
        )

    @staticmethod
    def _trigger_of(suspect: Cell) -> Cell | None:
        if suspect.job == "attack" or "trigger" in suspect.digests:
            return suspect
        return suspect.needs.get("images")


def _place(choice: Choice) -> dict[str, Any]:
    return {} if choice.x is None else {"x": choice.x}


def _check_settings(size: Size) -> None:
    """A size may hold settings of methods that are not installed, but not of families that do not exist."""
    for name in size.settings:
        family, _, method = name.partition(".")
        if family not in get_args(Family):
            raise SettingError(
                f"The size has settings for '{name}'; expected FAMILY.NAME such as defense.mimic."
            )
        if method in method_names(family):  # type: ignore[arg-type]
            create(family, method, size.settings[name])  # type: ignore[arg-type]
