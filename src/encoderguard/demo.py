"""The main job, end to end: train, backdoor, scan, purify, scan again, judge.

No step of the defender is given anything of the attacker's; ``story`` joins the two sides' records
afterwards.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from encoderguard import jobs
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet, load_images
from encoderguard.jobs.folder import compare_runs, read_identity
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import write_arrays
from encoderguard.loading import load_encoder
from encoderguard.recipes import Recipe, recipe_named
from encoderguard.results import DemoRecord, EvaluateRecord, PurifyRecord, Record, ScanRecord, read_record
from encoderguard.storage import prepare_folder, write_text
from encoderguard.story import Story, joined

__all__ = ["run_demo"]

_IDENTITY = "demo.json"
R = TypeVar("R", bound=Record)


class _Sets(NamedTuple):
    pretrain: ImageSet
    train: ImageSet
    test: ImageSet


def run_demo(
    *,
    out: Path,
    recipe: str | Recipe = "digits",
    images: str | None = None,
    downstream_train: str | None = None,
    downstream_test: str | None = None,
    target: int | None = None,
    clean_encoder: str | None = None,
    seeds: int = 1,
    resume: bool = False,
    **options: Any,
) -> DemoRecord:
    """Tell the whole story once per seed and record it.

    Args:
        out: folder; each step of each seed gets its own folder with record and report below it.
        recipe: name (``digits``, ``cifar10``, ``paper``) or the recipe itself.
        images: replaces the recipe's pre-training set, as do the next three for the downstream task.
        downstream_train: labelled images that the probes are trained on; the attacker's candidates.
        downstream_test: labelled images that the encoders are judged with.
        target: label the attacker aims at.
        clean_encoder: an encoder to use instead of pre-training one; the seeds then vary all later steps.
        seeds: how many times, with consecutive seeds.
        resume: keep the finished steps of an earlier, interrupted demo in ``out``.
        options: as every job takes; see JobOptions.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: a step failed.
        Stopped: the user asked to stop.
    """
    if seeds < 1:
        raise SettingError(f"The number of seeds must be at least 1, found {seeds}.")
    chosen = recipe if isinstance(recipe, Recipe) else recipe_named(recipe)
    chosen = recipe_named_like(
        chosen,
        images=images,
        downstream_train=downstream_train,
        downstream_test=downstream_test,
        target=target,
    )
    prepare_folder(out)
    shared = {
        key: value for key, value in options.items() if key not in ("seed", "out", "overwrite", "resume")
    }
    overwrite = options.get("overwrite", False) or resume
    merged: Any = options | {"out": out, "resume": False, "overwrite": overwrite}
    job_options: JobOptions = merged
    with Job(DemoRecord, job_options) as job:
        sets = _open(chosen, job_options)
        _remember(out, _identity(chosen, sets, clean_encoder, job.run.rng.seed), resume=resume)
        teller = _Teller(chosen, sets, clean_encoder, shared, resume)
        stories = [
            teller.tell(job.run.rng.seed + n, out / f"seed-{job.run.rng.seed + n}") for n in range(seeds)
        ]
        facts, arrays = joined(chosen, stories, sets.pretrain, sets.test, job.run)
        job.output("arrays.npz", lambda path: write_arrays(arrays, path))
        record: DemoRecord = job.finish(**facts)
    return record


def _identity(recipe: Recipe, sets: _Sets, clean_encoder: str | None, seed: int) -> dict[str, Any]:
    """What the steps that are kept depend on; further seeds may be added."""
    images = {name: f"{used.digest} {used.shape}" for name, used in sets._asdict().items()}
    encoder = None if clean_encoder is None else load_encoder(clean_encoder).fingerprint
    return {
        "recipe": recipe.model_dump(mode="json"),
        "images": images,
        "clean encoder": encoder,
        "seed": seed,
    }


def _remember(out: Path, identity: dict[str, Any], *, resume: bool) -> None:
    file = out / _IDENTITY
    if resume and file.exists():
        compare_runs(out, read_identity(file), identity)
    write_text(file, json.dumps(identity, indent=2) + "\n")


def recipe_named_like(recipe: Recipe, **changes: Any) -> Recipe:
    """``recipe`` with some fields replaced; None leaves a field."""
    given = {key: value for key, value in changes.items() if value is not None}
    return Recipe.model_validate(recipe.model_dump() | given)


def _open(recipe: Recipe, options: JobOptions) -> _Sets:
    root = options.get("data_root")

    def load(spec: str, labels: bool) -> ImageSet:
        return load_images(
            spec,
            size=options.get("image_size") or recipe.image_size,
            data_root=None if root is None else Path(root),
            download=options.get("download", False),
            labels=labels,
            skip_unreadable=options.get("skip_unreadable", False),
        )

    return _Sets(
        load(recipe.images, False), load(recipe.downstream_train, True), load(recipe.downstream_test, True)
    )


class _Teller:
    """Runs the steps of one story after another, each into its own folder."""

    def __init__(
        self, recipe: Recipe, sets: _Sets, clean_encoder: str | None, shared: Mapping[str, Any], resume: bool
    ) -> None:
        self.recipe, self.sets, self.clean_encoder = recipe, sets, clean_encoder
        self.shared, self.resume = shared, resume

    def tell(self, seed: int, folder: Path) -> Story:
        """All steps for one seed."""
        recipe, sets = self.recipe, self.sets
        clean = self.clean_encoder or self._pretrained(seed, folder / "clean")
        encoders = {"clean": clean}
        encoders["backdoored"] = self._attacked(seed, clean, folder / "backdoored")
        scans = {
            case: self._scan(seed, encoders[case], folder / f"scan-{case}")
            for case in ("clean", "backdoored")
        }
        target = folder / "purified"
        purified = (
            self._kept(target, PurifyRecord)
            or jobs.purify(
                encoders["backdoored"],
                sets.pretrain,
                defense="mimic",
                settings=recipe.purify,
                count=recipe.purify_count,
                **self._options(seed, target),
            ).record
        )
        encoders["purified"] = str(target / "encoder.safetensors")
        scans["purified"] = self._scan(seed, encoders["purified"], folder / "scan-purified")
        judged = {
            "backdoored": self._judge(seed, encoders["backdoored"], clean, folder),
            "purified": self._judge(seed, encoders["purified"], None, folder),
        }
        return Story(seed, scans, judged, purified, folder)

    def _pretrained(self, seed: int, folder: Path) -> str:
        recipe = self.recipe
        if self._kept(folder, Record) is None:
            jobs.pretrain(
                self.sets.pretrain,
                settings=recipe.pretrain,
                architecture=recipe.architecture,
                width=recipe.width,
                stem=recipe.stem,
                count=recipe.pretrain_count,
                **self._options(seed, folder) | {"normalisation": recipe.normalisation},
            )
        return str(folder / "encoder.safetensors")

    def _attacked(self, seed: int, clean: str, folder: Path) -> str:
        if self._kept(folder, Record) is None:
            jobs.attack(
                clean,
                self.sets.pretrain,
                settings=self.recipe.attack,
                downstream=self.sets.train,
                target=self.recipe.target,
                count=self.recipe.shadow_count,
                **self._options(seed, folder),
            )
        return str(folder / "encoder.safetensors")

    def _scan(self, seed: int, encoder: str, folder: Path) -> ScanRecord:
        return (
            self._kept(folder, ScanRecord)
            or jobs.scan(
                encoder,
                self.sets.pretrain,
                settings=self.recipe.scan,
                count=self.recipe.scan_count,
                **self._options(seed, folder),
            ).record
        )

    def _judge(self, seed: int, encoder: str, clean: str | None, story: Path) -> EvaluateRecord:
        folder = story / f"evaluate-{Path(encoder).parent.name}"
        return (
            self._kept(folder, EvaluateRecord)
            or jobs.evaluate(
                encoder,
                self.sets.train,
                self.sets.test,
                trigger=story / "backdoored" / "trigger.json",
                target=self.recipe.target,
                clean_encoder=clean,
                probe=self.recipe.probe,
                settings=self.recipe.probe_settings,
                **self._options(seed, folder),
            ).record
        )

    def _options(self, seed: int, folder: Path) -> Any:
        unfinished = self.resume and any(folder.glob("checkpoint*.pt"))
        return {**self.shared, "seed": seed, "out": folder, "resume": unfinished, "overwrite": not unfinished}

    def _kept(self, folder: Path, kind: type[R]) -> R | None:
        """The record of a step that an interrupted demo finished."""
        if not self.resume or not (folder / "result.json").exists():
            return None
        record = read_record(folder)
        return record if isinstance(record, kind) and record.status == "success" else None
