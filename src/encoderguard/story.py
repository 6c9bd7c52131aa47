"""Joins what the attacker did and what the defender found, after both are done."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.information import Profile, layer_profile
from encoderguard.jobs.found import recovered
from encoderguard.jobs.pictures import Arrays, embeddings, examples
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.recipes import Recipe
from encoderguard.results import EvaluateRecord, PurifyRecord, ScanRecord, read_record
from encoderguard.run import Run
from encoderguard.triggers import MaskedPattern, Trigger, load_trigger

__all__ = ["Story", "joined"]

_CASES = ("clean", "backdoored", "purified")


class Story(NamedTuple):
    """What one seed left behind."""

    seed: int
    scans: dict[str, ScanRecord]
    judged: dict[str, EvaluateRecord]
    purified: PurifyRecord
    folder: Path


def joined(
    recipe: Recipe, stories: list[Story], images: ImageSet, test: ImageSet, run: Run
) -> tuple[dict[str, Any], Arrays]:
    """The fields of the demo's record and the arrays of its report; pictures are of the first seed."""
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
        **_profiles(encoders["backdoored"], images, trigger, recipe, run),
    }
    arrays = examples(test, trigger)
    for case in ("clean", "backdoored"):
        found = (
            load_trigger(first.folder / f"scan-{case}" / "recovered-trigger.json")
            if _has_trigger(first, case)
            else None
        )
        if isinstance(found, MaskedPattern):
            arrays |= {f"{name}_{case}": value for name, value in recovered(test, found).items()}
    for case, encoder in encoders.items():
        arrays |= embeddings({f"embedding_{case}": encoder}, test, run=run, trigger=trigger)
    return facts, arrays


def _has_trigger(story: Story, case: str) -> bool:
    return (story.folder / f"scan-{case}" / "recovered-trigger.json").exists()


def _encoders(story: Story) -> dict[str, Encoder]:
    backdoored = read_record(story.folder / "backdoored")
    assert backdoored.encoder is not None
    assert backdoored.encoder.spec is not None
    return {
        "clean": load_encoder(backdoored.encoder.spec),
        "backdoored": load_encoder(str(story.folder / "backdoored" / "encoder.safetensors")),
        "purified": load_encoder(str(story.folder / "purified" / "encoder.safetensors")),
    }


def _numbers(story: Story, case: str) -> dict[str, float | None]:
    source = story.judged["purified" if case == "purified" else "backdoored"]
    prefix = "clean_" if case == "clean" else ""
    values = {name: getattr(source, prefix + name) for name in ("acc", "asr", "asr_all")}
    return values | {"score": story.scans[case].score}


def _case(case: str, stories: list[Story]) -> dict[str, Any]:
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


def _run_facts(story: Story) -> dict[str, Any]:
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
