"""The jobs that make encoders to test with: pre-training a clean one, planting a backdoor."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from encoderguard.backbones import Stem
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.image_decoding import decode, fit
from encoderguard.images import ImageSet
from encoderguard.jobs.facts import encoder_facts, image_facts
from encoderguard.jobs.folder import ARRAYS, ENCODER, HEAD, TRIGGER
from encoderguard.jobs.heads import write_head
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import embeddings, examples, write_arrays
from encoderguard.loading import spec_for
from encoderguard.methods import EncoderAttack, Monitor, Planted, Pretrained, Pretraining, Reference
from encoderguard.monitoring import KNNMonitor
from encoderguard.references import choose_references, read_field_reference
from encoderguard.results import AttackRecord, PretrainRecord
from encoderguard.triggers import save_trigger

__all__ = ["AttackResult", "PretrainResult", "attack", "pretrain"]


class PretrainResult(NamedTuple):
    """What ``pretrain`` returns."""

    record: PretrainRecord
    encoder: Encoder
    pretrained: Pretrained


class AttackResult(NamedTuple):
    """What ``attack`` returns."""

    record: AttackRecord
    encoder: Encoder
    planted: Planted
    references: list[Reference]


def pretrain(
    images: ImageSet | str,
    *,
    method: str | Pretraining = "simclr",
    settings: Mapping[str, Any] | None = None,
    encoder: Encoder | None = None,
    architecture: str = "resnet18",
    width: int = 64,
    stem: Stem = "cifar",
    count: int | None = None,
    monitor_train: ImageSet | str | None = None,
    monitor_test: ImageSet | str | None = None,
    monitor_every: int = 1,
    **options: Unpack[JobOptions],
) -> PretrainResult:
    """Train an encoder; labels are looked at only by methods that need them.

    Args:
        images: an image set or its spec.
        method: name of a pre-training method, or the method itself.
        settings: of the named method.
        encoder: where to start from; by default random weights of the next three.
        architecture: as ``spec_for`` takes it.
        width: channels of the first stage.
        stem: ``cifar`` for small images, ``imagenet`` for large ones.
        count: images to draw with the seed; None takes all.
        monitor_train: labelled clean images for a kNN accuracy that is measured while training, and shown;
            it changes nothing else.
        monitor_test: labelled clean images that the accuracy is of; needed with the former.
        monitor_every: epochs from one measurement to the next.
        options: see JobOptions. ``out`` receives ``encoder.safetensors``, the record, the report, and
            ``head.safetensors`` where the method keeps a classifier or a text tower.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: training failed.
        Stopped: the user asked to stop.
    """
    with Job(PretrainRecord, options) as job:
        chosen: Pretraining = job.method("pretrain", method, settings)
        if encoder is None:
            named = options.get("normalisation")
            spec = spec_for(architecture, width=width, stem=stem, normalisation=named)
            encoder = Encoder.build(spec, job.run.rng.child("encoder"))
        job.encoder(encoder)
        used, _ = job.draw(_training_images(job, chosen, images), count)
        monitor = _monitor(job, monitor_train, monitor_test, monitor_every)
        job.begin()
        done = job.perform(chosen.train, encoder, used, part="pretrain", monitor=monitor)
        job.check(done.encoder, used)
        arrays = examples(used) | embeddings({"embedding": done.encoder}, used, run=job.run)
        job.output(ENCODER, partial(done.encoder.save, provenance=job.provenance()))
        if done.head is not None:
            job.output(HEAD, partial(write_head, done.head))
        job.output(ARRAYS, partial(write_arrays, arrays))
        record = job.finish(result_encoder=encoder_facts(done.encoder), history=done.history)
    return PretrainResult(record, done.encoder, done)


def _training_images(job: Job[PretrainRecord], method: Pretraining, given: ImageSet | str) -> ImageSet:
    if not method.needs_labels:
        return job.images(given)
    if method.takes_captions:
        found = job.images(given)
        if found.captions is not None:
            return found
    return job.images(given, labels=True)


def _monitor(
    job: Job[PretrainRecord], train: ImageSet | str | None, test: ImageSet | str | None, every: int
) -> Monitor | None:
    if train is None and test is None:
        return None
    if train is None or test is None:
        raise SettingError("A monitor needs both --monitor-train and --monitor-test, labelled clean images.")
    if every < 1:
        raise SettingError(f"The epochs between two measurements must be at least 1, found {every}.")
    return KNNMonitor(
        train=job.images(train, labels=True),
        test=job.images(test, labels=True),
        run=job.run.silent(),
        every=every,
    )


def attack(
    encoder: Encoder | str,
    images: ImageSet | str,
    *,
    method: str | EncoderAttack = "badencoder",
    settings: Mapping[str, Any] | None = None,
    references: Sequence[Reference | Path | str] = (),
    downstream: ImageSet | str | None = None,
    target: int | None = None,
    reference_count: int = 1,
    count: int | None = None,
    **options: Unpack[JobOptions],
) -> AttackResult:
    """Plant a backdoor in a copy of a clean encoder, to test detectors and defenses against.

    Args:
        encoder: the clean encoder or its spec.
        images: the attacker's shadow images, unlabelled.
        method: name of an encoder attack, or the attack itself.
        settings: of the named attack.
        references: images of the target class, as pictures or the field's ``.npz``; or the next two.
        downstream: the attacker's labelled downstream *training* images, to choose the reference from.
        target: the label aimed at.
        reference_count: references to choose from ``downstream``; some attacks want several.
        count: shadow images to draw with the seed; None takes all.
        options: see JobOptions. ``out`` receives encoder, ``trigger.json``, record and report.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the attack failed.
        Stopped: the user asked to stop.
    """
    with Job(AttackRecord, options) as job:
        chosen = job.method("attack", method, settings)
        if not isinstance(chosen, EncoderAttack):
            raise SettingError(
                f"'{chosen.name}' poisons a training set and takes no encoder; "
                f"use 'encoderguard poison {chosen.name} --images SET --target N'."
            )
        source = job.encoder(encoder)
        used, _ = job.draw(job.images(images), count)
        job.check(source, used)
        found = _references(job, source, used, references, downstream, target, reference_count)
        job.begin(references=[entry["digest"] for entry in job.facts["references"]])
        with job.timing() as run:
            planted = chosen.plant(source, used, found, run=run)
        arrays = examples(used, planted.trigger, found)
        arrays |= embeddings({"embedding": planted.encoder}, used, run=run, trigger=planted.trigger)
        job.output(ENCODER, partial(planted.encoder.save, provenance=job.provenance()))
        job.output(TRIGGER, partial(save_trigger, planted.trigger))
        job.output(ARRAYS, partial(write_arrays, arrays))
        evidence = job.facts.pop("evidence", {}) | planted.evidence
        record = job.finish(
            result_encoder=encoder_facts(planted.encoder), history=planted.history, evidence=evidence
        )
    return AttackResult(record, planted.encoder, planted, found)


def _references(
    job: Job[AttackRecord],
    encoder: Encoder,
    images: ImageSet,
    given: Sequence[Reference | Path | str],
    downstream: ImageSet | str | None,
    target: int | None,
    count: int,
) -> list[Reference]:
    if bool(given) == (downstream is not None):
        raise SettingError(
            "An attack needs a reference image: give either --reference, or --downstream with --target."
        )
    if downstream is None:
        found = [_read_reference(item, images.shape[0]) for item in given]
        sources = [str(item) if isinstance(item, str | Path) else "in memory" for item in given]
        label = found[0].label if target is None else target
    else:
        if target is None:
            raise SettingError("--downstream needs --target, the label that the attacker aims at.")
        candidates = job.images(downstream, labels=True)
        run = job.run.child("reference")
        found, evidence = choose_references(encoder, candidates, target, count, run=run)
        job.note(downstream=image_facts(candidates), evidence=evidence)
        sources, label = [candidates.spec] * count, target
    job.note(
        target=label,
        references=[
            {"source": source, "label": reference.label, "digest": _digest(reference)}
            for source, reference in zip(sources, found, strict=True)
        ],
    )
    return found


def _read_reference(item: Reference | Path | str, side: int) -> Reference:
    if isinstance(item, Reference):
        return item
    path = Path(item)
    return (
        read_field_reference(path)
        if path.suffix == ".npz"
        else Reference(image=fit(decode(path, str(path)), side))
    )


def _digest(reference: Reference) -> str:
    return hashlib.sha256(reference.image.cpu().contiguous().numpy().tobytes()).hexdigest()
