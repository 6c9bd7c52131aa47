"""The main job, end to end: train, backdoor, scan, purify, scan again, judge.

Only this module (and the benchmark) joins the attacker's truth to what the defender found, afterwards.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from encoderguard import jobs
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet, load_images
from encoderguard.information import Profile, layer_profile
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import Arrays, embeddings, examples, recovered, write_arrays
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.recipes import Recipe, recipe_named
from encoderguard.results import DemoRecord, EvaluateRecord, PurifyRecord, Record, ScanRecord, read_record
from encoderguard.run import Run
from encoderguard.storage import prepare_folder
from encoderguard.triggers import MaskedPattern, Trigger, load_trigger

__all__ = ["run_demo"]

R = TypeVar("R", bound=Record)
_CASES = ("clean", "backdoored", "purified")


class _Sets(NamedTuple):
    pretrain: ImageSet
    train: ImageSet
    test: ImageSet


class _Story(NamedTuple):
    """What one seed left behind."""

    seed: int
    scans: dict[str, ScanRecord]
    judged: dict[str, EvaluateRecord]
    purified: PurifyRecord
    folder: Path


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
    merged: Any = options | {
        "out": out,
        "resume": False,
        "overwrite": options.get("overwrite", False) or resume,
    }
    job_options: JobOptions = merged
    with Job(DemoRecord, job_options) as job:
        sets = _open(chosen, job_options)
        teller = _Teller(chosen, sets, clean_encoder, shared, resume)
        stories = [
            teller.tell(job.run.rng.seed + n, out / f"seed-{job.run.rng.seed + n}") for n in range(seeds)
        ]
        facts, arrays = _joined(chosen, stories, sets, job.run)
        job.output("arrays.npz", lambda path: write_arrays(arrays, path))
        record: DemoRecord = job.finish(**facts)
    return record


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

    def tell(self, seed: int, folder: Path) -> _Story:
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
        return _Story(seed, scans, judged, purified, folder)

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


def _joined(recipe: Recipe, stories: list[_Story], sets: _Sets, run: Run) -> tuple[dict[str, Any], Arrays]:
    first = stories[0]
    trigger = load_trigger(first.folder / "backdoored" / "trigger.json")
    encoders = _encoders(first)
    facts: dict[str, Any] = {case: _case(case, stories) for case in _CASES}
    facts |= {
        "recipe": recipe.model_dump(mode="json"),
        "target": recipe.target,
        "trigger": trigger.to_dict()
        if not isinstance(trigger, MaskedPattern)
        else {"kind": "masked_pattern"},
        "seeds": len(stories),
        "seed": first.seed,
        "beta": first.purified.evidence.get("beta"),
        "fidelity": first.purified.fidelity,
        "runs": [_run_facts(story) for story in stories],
        **_profiles(encoders["backdoored"], sets.pretrain, trigger, recipe, run),
    }
    arrays = examples(sets.test, trigger)
    for case in ("clean", "backdoored"):
        found = (
            load_trigger(first.folder / f"scan-{case}" / "recovered-trigger.json")
            if _has_trigger(first, case)
            else None
        )
        if isinstance(found, MaskedPattern):
            arrays |= {f"{name}_{case}": value for name, value in recovered(found).items()}
    for case, encoder in encoders.items():
        arrays |= embeddings({f"embedding_{case}": encoder}, sets.test, run=run, trigger=trigger)
    return facts, arrays


def _has_trigger(story: _Story, case: str) -> bool:
    return (story.folder / f"scan-{case}" / "recovered-trigger.json").exists()


def _encoders(story: _Story) -> dict[str, Encoder]:
    backdoored = read_record(story.folder / "backdoored")
    assert backdoored.encoder is not None
    assert backdoored.encoder.spec is not None
    return {
        "clean": load_encoder(backdoored.encoder.spec),
        "backdoored": load_encoder(str(story.folder / "backdoored" / "encoder.safetensors")),
        "purified": load_encoder(str(story.folder / "purified" / "encoder.safetensors")),
    }


def _numbers(story: _Story, case: str) -> dict[str, float | None]:
    source = story.judged["purified" if case == "purified" else "backdoored"]
    prefix = "clean_" if case == "clean" else ""
    values = {name: getattr(source, prefix + name) for name in ("acc", "asr", "asr_all")}
    return values | {"score": story.scans[case].score}


def _case(case: str, stories: list[_Story]) -> dict[str, Any]:
    """Mean over the seeds, the single values, and the verdict of all seeds (or "mixed")."""
    per_seed = [_numbers(story, case) for story in stories]
    verdicts = [story.scans[case].verdict for story in stories]
    facts: dict[str, Any] = {
        "verdict": verdicts[0] if len(set(verdicts)) == 1 else "mixed",
        "verdict_seeds": verdicts,
        "threshold": stories[0].scans[case].threshold,
    }
    for name in ("acc", "asr", "asr_all", "score"):
        values = [numbers[name] for numbers in per_seed]
        known = [value for value in values if value is not None]
        facts[name] = float(np.mean(known)) if known else None
        facts[f"{name}_seeds"] = values
    return facts


def _run_facts(story: _Story) -> dict[str, Any]:
    seconds = {
        path.parent.name: read_record(path.parent).seconds
        for path in sorted(story.folder.glob("*/result.json"))
    }
    rows = {case: _numbers(story, case) | {"verdict": story.scans[case].verdict} for case in _CASES}
    evidence = read_record(story.folder / "backdoored").model_dump()["evidence"]
    return {
        "seed": story.seed,
        **rows,
        "seconds": seconds,
        "reference_confidence": evidence.get("reference_confidence"),
        "fidelity": story.purified.fidelity,
    }


def _profiles(
    encoder: Encoder, images: ImageSet, trigger: Trigger, recipe: Recipe, run: Run
) -> dict[str, Any]:
    """Figure 3 of MIMIC: the dependence of stages on features for clean and for triggered inputs."""
    count = min(recipe.purify_count, len(images), 1000)
    pixels = images.take(Rng(run.rng.seed).child("profile").permutation(len(images))[:count]).float() / 255
    kinds: dict[str, Trigger | None] = {"profiles": None, "profiles_triggered": trigger}
    found: dict[str, list[Profile]] = {
        name: [
            layer_profile(encoder, pixels, measure=measure, run=run, trigger=stamp)
            for measure in ("mine", "cka")
        ]
        for name, stamp in kinds.items()
    }
    return {name: [profile.model_dump(mode="json") for profile in value] for name, value in found.items()}
