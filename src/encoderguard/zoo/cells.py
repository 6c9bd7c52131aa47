"""One cell from nothing to a measured bundle: train, export as float16, judge what was exported.

Each step is a job with a folder of its own below the cell's: see ``steps``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoderguard import jobs
from encoderguard.encoder import Encoder
from encoderguard.jobs.folder import ENCODER, POISONED, TRIGGER
from encoderguard.jobs.options import JobOptions
from encoderguard.loading import spec_for
from encoderguard.probes import make_probe
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.results import Record
from encoderguard.zoo.entries import Files, entry_of
from encoderguard.zoo.identity import trigger_digest
from encoderguard.zoo.manifest import Entry
from encoderguard.zoo.pictures import Pictures
from encoderguard.zoo.recipe import Cell
from encoderguard.zoo.steps import Step, current, done

__all__ = ["Maker", "Site"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a zoo is built."""

    recipe: str
    """Its name."""
    zoo: Path
    """Folder of the bundles, the triggers and the manifest."""
    build: Path
    """Folder of the jobs, one per cell."""
    pictures: Pictures
    device: str = "cpu"
    adopt: Path | None = None
    """Folder with finished jobs to take over where they are what a cell asks for."""


class Maker:
    """Makes one cell; its clean encoder, if it has one, is in the zoo already."""

    def __init__(self, site: Site, cell: Cell, options: JobOptions | None = None) -> None:
        self.site, self.cell = site, cell
        self._options: JobOptions = options or {}
        self.folder = site.build / cell.name
        self.files = Files(site.zoo, cell.name, triggered=cell.attack is not None)

    def kept(self) -> Entry | None:
        """The entry, if nothing needs to be done."""
        if self.cell.poisons_data and current(self._poisoning()) is None:
            return None
        trained = current(self._training())
        if trained is None or not self._export(trained, only_look=True):
            return None
        judged = current(self._judging())
        return None if judged is None else self._entry(trained, judged)

    def make(self) -> Entry:
        """Do what is missing. Raises as the jobs do."""
        if self.cell.poisons_data:
            self._do(self._poisoning(), self._poison)
        trained = self._do(self._training(), self._attack if self._fine_tunes else self._pretrain)
        self._export(trained)
        return self._entry(trained, self._do(self._judging(), self._judge))

    # --- the three jobs: what each should be, and how to run it -------------------------------------

    @property
    def _fine_tunes(self) -> bool:
        return self.cell.attack is not None and not self.cell.poisons_data

    @property
    def needs_labels(self) -> bool:
        """Whether the pre-training takes labels."""
        return bool(create("pretrain", self.cell.pretrain, self.cell.pretrain_settings).needs_labels)

    def _poisoning(self) -> Step:
        cell = self.cell
        method = create("attack", str(cell.attack), cell.settings)
        same = self._same("poison", method.name, method.settings())
        same |= {"target": cell.target, "images": self.digest(labels=True)}
        return Step(self.folder / "poison", same, create("attack", method.name).settings())

    def _poison(self, options: JobOptions) -> Record:
        cell, task = self.cell, self.cell.task
        images = self.site.pictures.drawn(task.images, task.image_size, task.count, cell.seed, labels=True)
        assert cell.target is not None
        return jobs.poison(
            images, method=str(cell.attack), settings=cell.settings, target=cell.target, **options
        ).record

    def _training(self) -> Step:
        cell, task = self.cell, self.cell.task
        if self._fine_tunes:
            method = create("attack", str(cell.attack), cell.settings)
            same = self._same("attack", method.name, method.settings())
            same |= {"target": cell.target, "encoder": self._clean_fingerprint, "images": self.digest()}
            same |= {"downstream": self.whole(task.downstream_train), "references": cell.references}
            return Step(self.folder / "encoder", same, create("attack", method.name).settings())
        method = create("pretrain", cell.pretrain, cell.pretrain_settings)
        same = self._same("pretrain", method.name, method.settings())
        spec = spec_for(task.architecture, width=task.width, stem=task.stem, normalisation=task.normalisation)
        same["encoder"] = Encoder.build(spec, Rng(cell.seed).child("encoder")).fingerprint
        labels = self.needs_labels
        same["images"] = self._digest_of_poisoned(labels) if cell.poisons_data else self.digest(labels=labels)
        return Step(self.folder / "encoder", same, create("pretrain", method.name).settings())

    def _pretrain(self, options: JobOptions) -> Record:
        cell, task = self.cell, self.cell.task
        clean = not cell.poisons_data
        labels, poisoned = self.needs_labels, str(self.folder / "poison" / POISONED)
        images = self._images(task.images, labels=labels) if clean else poisoned
        return jobs.pretrain(
            images,
            method=cell.pretrain,
            settings=cell.pretrain_settings,
            architecture=task.architecture,
            width=task.width,
            stem=task.stem,
            count=task.count if clean else None,
            **options | {"normalisation": task.normalisation},
        ).record

    def _attack(self, options: JobOptions) -> Record:
        cell, task = self.cell, self.cell.task
        return jobs.attack(
            str(self._clean_bundle),
            self._images(task.images),
            method=str(cell.attack),
            settings=cell.settings,
            downstream=self._images(task.downstream_train, labels=True),
            target=cell.target,
            reference_count=cell.references,
            count=task.count,
            **options,
        ).record

    def _judging(self) -> Step:
        cell, task = self.cell, self.cell.task
        probe = make_probe(task.probe, **task.probe_settings)
        same = self._same("evaluate", probe.name, probe.settings())
        same |= {"encoder": Encoder.load(self.files.bundle).fingerprint, "target": cell.target}
        same |= {
            "images": self.whole(task.downstream_train),
            "test_images": self.whole(task.downstream_test),
        }
        same["seeds"] = task.probe_seeds if probe.stochastic else 1
        if cell.attack is not None:
            same |= {"clean_encoder": self._clean_fingerprint, "trigger": trigger_digest(self.files.trigger)}
        return Step(self.folder / "evaluate", same, make_probe(task.probe).settings())

    def _judge(self, options: JobOptions) -> Record:
        cell, task = self.cell, self.cell.task
        attacked = cell.attack is not None
        return jobs.evaluate(
            str(self.files.bundle),
            self._images(task.downstream_train, labels=True),
            self._images(task.downstream_test, labels=True),
            trigger=self.files.trigger if attacked else None,
            target=cell.target,
            clean_encoder=str(self._clean_bundle) if attacked else None,
            probe=task.probe,
            settings=task.probe_settings,
            seeds=task.probe_seeds,
            **options,
        ).record

    # --- what the steps share ---------------------------------------------------------------------

    def _do(self, step: Step, run: Callable[[JobOptions], Record]) -> Record:
        cell = self.cell
        own: Any = {
            "seed": cell.seed,
            "device": self.site.device,
            "precision": cell.task.precision,
            "image_size": cell.task.image_size,
        }
        return done(step, run, self._options | own, adopt=self.site.adopt)

    def _same(self, job: str, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        task = self.cell.task
        same = {"job": job, "method": method, "settings": dict(settings), "seed": self.cell.seed}
        same["precision"] = task.precision
        return same if task.image_size is None else same | {"images_size": task.image_size}

    def _images(self, spec: str, *, labels: bool = False) -> Any:
        return self.site.pictures.load(spec, self.cell.task.image_size, labels=labels)

    def digest(self, *, labels: bool = False) -> str:
        """Of the images that the cell draws."""
        task = self.cell.task
        return self.site.pictures.digest(
            task.images, task.image_size, task.count, self.cell.seed, labels=labels
        )

    def _digest_of_poisoned(self, labels: bool) -> str:
        size, path = self.cell.task.image_size, self.folder / "poison" / POISONED
        return self.site.pictures.digest(str(path), size, None, 0, labels=labels)

    def whole(self, spec: str) -> str:
        """Of a labelled set."""
        return self.site.pictures.digest(spec, self.cell.task.image_size, None, 0, labels=True)

    # --- files in the zoo -------------------------------------------------------------------------

    @property
    def _clean_bundle(self) -> Path:
        return Files(self.site.zoo, str(self.cell.clean), triggered=False).bundle

    @property
    def _clean_fingerprint(self) -> str:
        return Encoder.load(self._clean_bundle).fingerprint

    def _source_trigger(self) -> Path:
        return self.folder / ("poison" if self.cell.poisons_data else "encoder") / TRIGGER

    def _export(self, trained: Record, *, only_look: bool = False) -> bool:
        """Bring encoder and trigger into the zoo; whether they were there already."""
        cell = self.cell
        encoder = Encoder.load(self.folder / "encoder" / ENCODER)
        provenance = {
            "zoo": self.site.recipe,
            "cell": cell.name,
            **cell.model_dump(mode="json", include={"attack", "pretrain", "target", "seed", "clean"}),
            "settings": trained.settings,
        }
        folder = self.folder / ("poison" if cell.poisons_data else "encoder")
        files = (encoder, provenance, folder / TRIGGER if cell.attack is not None else None)
        there = self.files.hold(*files)
        if not there and not only_look:
            self.files.store(*files)
        return there

    def _entry(self, trained: Record, judged: Record) -> Entry:
        return entry_of(self.cell, trained, judged, self.files)
