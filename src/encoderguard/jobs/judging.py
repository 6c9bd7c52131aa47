"""The job of whoever knows the truth: what an encoder is worth, how far its backdoor reaches."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.evaluation import Evaluation, evaluate_encoder
from encoderguard.images import ImageSet
from encoderguard.jobs.facts import image_facts
from encoderguard.jobs.folder import ARRAYS
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import embeddings, examples, write_arrays
from encoderguard.probes import Probe, make_probe
from encoderguard.results import EvaluateRecord
from encoderguard.triggers import Trigger, load_trigger

__all__ = ["EvaluateResult", "evaluate"]

_MEASURES = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "clean_asr_all")


class EvaluateResult(NamedTuple):
    """What ``evaluate`` returns."""

    record: EvaluateRecord
    evaluation: Evaluation


def evaluate(
    encoder: Encoder | str,
    train: ImageSet | str,
    test: ImageSet | str,
    *,
    trigger: Trigger | Path | str | None = None,
    target: int | None = None,
    clean_encoder: Encoder | str | None = None,
    probe: str | Probe = "mlp",
    settings: Mapping[str, Any] | None = None,
    seeds: int = 1,
    **options: Unpack[JobOptions],
) -> EvaluateResult:
    """Measure accuracy and, with a known trigger, attack success of an encoder on a downstream task.

    Args:
        encoder: the encoder or its spec.
        train: labelled images for the probe, or their spec.
        test: labelled images of the same classes, or their spec.
        trigger: the attacker's, or its file (``trigger.json`` or the field's ``.npz``).
        target: the label aimed at; needed with a trigger.
        clean_encoder: measured beside it, as the floor of the attack success.
        probe: ``mlp``, ``linear``, ``knn``, or a probe.
        settings: of the named probe.
        seeds: probes to fit.
        options: see JobOptions. ``out`` receives the record and the report.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the evaluation failed.
        Stopped: the user asked to stop.
    """
    with Job(EvaluateRecord, options) as job:
        chosen = _probe(probe, settings)
        job.note(method=chosen.name, settings=chosen.settings(), settings_passed=dict(settings or {}))
        if isinstance(trigger, str | Path):
            job.require_apart(trigger)
        stamp = load_trigger(Path(trigger)) if isinstance(trigger, str | Path) else trigger
        job.note(trigger=None if stamp is None else _trigger_facts(trigger, stamp), target=target)
        judged = job.encoder(encoder)
        clean = None if clean_encoder is None else job.encoder(clean_encoder, "clean_encoder")
        known, unseen = job.images(train, labels=True), job.images(test, labels=True)
        job.note(images=image_facts(known), test_images=image_facts(unseen))
        job.check(judged, unseen)
        job.begin()
        with job.timing() as run:
            found = evaluate_encoder(
                judged,
                known,
                unseen,
                run=run,
                probe=chosen,
                trigger=stamp,
                target=target,
                clean_encoder=clean,
                seeds=seeds,
            )
        arrays = examples(unseen, stamp) | embeddings({"embedding": judged}, unseen, run=run, trigger=stamp)
        job.output(ARRAYS, partial(write_arrays, arrays))
        record = job.finish(**_fields(found))
    return EvaluateResult(record, found)


def _probe(probe: str | Probe, settings: Mapping[str, Any] | None) -> Probe:
    if isinstance(probe, str):
        return make_probe(probe, **(settings or {}))
    if settings:
        raise SettingError("Settings go with a probe's name; a probe object has its own already.")
    return probe


def _trigger_facts(given: Trigger | Path | str | None, trigger: Trigger) -> dict[str, Any]:
    content = repr(trigger.to_dict()).encode()
    return {
        "source": str(given) if isinstance(given, str | Path) else "in memory",
        "kind": trigger.to_dict().get("kind"),
        "digest": hashlib.sha256(content).hexdigest(),
    }


def _fields(found: Evaluation) -> dict[str, Any]:
    measures = {name: value for name in _MEASURES if (value := getattr(found, name)) is not None}
    return {
        **{name: value.mean for name, value in measures.items()},
        "intervals": {name: value.model_dump(mode="json") for name, value in measures.items()},
        "target": found.target,
        "target_name": found.target_name,
        "seeds": found.seeds,
        "counts": {"train": found.n_train, "test": found.n_test, "target": found.n_target},
    }
