"""The jobs of whoever received an encoder: scan it, purify it. Clean unlabelled images are all they take."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.fidelity import label_free_fidelity
from encoderguard.images import ImageSet
from encoderguard.jobs.facts import encoder_facts
from encoderguard.jobs.folder import ARRAYS, ENCODER, PLAIN, RECOVERED, STRONGEST
from encoderguard.jobs.found import found_arrays, recovered
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import embeddings, examples, write_arrays
from encoderguard.methods import Defense, Detection, Detector, Purified
from encoderguard.results import PurifyRecord, ScanRecord
from encoderguard.run import Run
from encoderguard.triggers import save_trigger

__all__ = ["PURIFY_IMAGES", "SCAN_IMAGES", "PurifyResult", "ScanResult", "purify", "scan"]

SCAN_IMAGES = 1000
"""Images that a scan draws unless told otherwise (DECREE: a tenth of the CIFAR-10 test set)."""
PURIFY_IMAGES = 2000
"""Images that a purification draws unless told otherwise (MIMIC: 4 % of CIFAR-10)."""
_HELD_OUT, _FEWEST = 1000, 50


class ScanResult(NamedTuple):
    """What ``scan`` returns."""

    record: ScanRecord
    detection: Detection


class PurifyResult(NamedTuple):
    """What ``purify`` returns."""

    record: PurifyRecord
    encoder: Encoder
    purified: Purified


def detector_for(settings: Mapping[str, Any] | None) -> str:
    """The detector where none is named: beside clean encoders the trigger search, without them DECREE."""
    return "trigger_search" if (settings or {}).get("references") else "decree"


def with_references(settings: Mapping[str, Any] | None, references: Sequence[str]) -> dict[str, Any]:
    """The settings with the references among them. Raises SettingError if they have some already."""
    given = dict(settings or {})
    if not references:
        return given
    if "references" in given:
        raise SettingError("References were given as such and as a setting; give them once.")
    return given | {"references": tuple(references)}


def scan(
    encoder: Encoder | str,
    images: ImageSet | str,
    *,
    detector: str | Detector | None = None,
    settings: Mapping[str, Any] | None = None,
    references: Sequence[str] = (),
    count: int | None = None,
    **options: Unpack[JobOptions],
) -> ScanResult:
    """Look for the behaviour of a backdoor in an encoder, with clean unlabelled images.

    Args:
        encoder: the encoder or its spec.
        images: clean images like those the encoder was trained on, or their spec; labels are not looked at.
        detector: name of a detector, or the detector itself; by default see ``detector_for``.
        settings: of the named detector.
        references: clean encoders of the suspect's architecture, or folders of a zoo, for a named detector
            that compares with such.
        count: images to draw with the seed; 1,000 unless given.
        options: see JobOptions. ``out`` receives ``recovered-trigger.json``, from the trigger search also
            ``strongest-trigger.json`` and ``plain-trigger.json``, the record and the report.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the scan failed.
        Stopped: the user asked to stop.
    """
    with Job(ScanRecord, options) as job:
        settings = with_references(settings, references)
        named = detector_for(settings) if detector is None else detector
        chosen: Detector = job.method("detector", named, settings)
        job.note(detector=chosen.name)
        suspect = job.encoder(encoder)
        used, _ = job.draw(job.images(images), count, SCAN_IMAGES)
        job.check(suspect, used)
        job.begin()
        with job.timing() as run:
            found = chosen.detect(suspect, used, run=run)
        if found.trigger is not None:
            job.output(RECOVERED, partial(save_trigger, found.trigger))
        if found.strongest is not None:
            job.output(STRONGEST, partial(save_trigger, found.strongest))
        if found.plain is not None:
            job.output(PLAIN, partial(save_trigger, found.plain))
        arrays = examples(used, found.trigger) | found_arrays(used, found)
        arrays |= embeddings({"embedding": suspect}, used, run=run, trigger=found.trigger)
        job.output(ARRAYS, partial(write_arrays, arrays))
        record = job.finish(
            verdict=found.verdict,
            score=found.score,
            threshold=found.threshold,
            p_value=found.p_value,
            evidence=found.evidence,
        )
    return ScanResult(record, found)


def purify(
    encoder: Encoder | str,
    images: ImageSet | str,
    *,
    defense: str | Defense = "mimic",
    settings: Mapping[str, Any] | None = None,
    count: int | None = None,
    **options: Unpack[JobOptions],
) -> PurifyResult:
    """Make an encoder that behaves like a suspect one on clean images, without its backdoor.

    Args:
        encoder: the suspect encoder or its spec.
        images: clean images like those the encoder was trained on, or their spec; labels are not looked at.
        defense: name of a defense, or the defense itself.
        settings: of the named defense.
        count: images to draw with the seed; 2,000 unless given.
        options: see JobOptions. ``out`` receives ``encoder.safetensors``, the record and the report, and
            ``recovered-trigger.json`` from a defense that recovers one.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the purification failed.
        Stopped: the user asked to stop.
    """
    with Job(PurifyRecord, options) as job:
        chosen: Defense = job.method("defense", defense, settings)
        job.note(defense=chosen.name)
        suspect = job.encoder(encoder)
        whole = job.images(images)
        used, rest = job.draw(whole, count, PURIFY_IMAGES)
        job.check(suspect, used)
        job.begin()
        run = job.run
        done = job.perform(chosen.purify, suspect, used)
        job.check(done.encoder, used)
        if reason := done.evidence.get("fallback"):
            job.warn(str(reason))
        maps = {"embedding_before": suspect, "embedding_after": done.encoder}
        arrays = examples(used) | recovered(used, done.trigger) | embeddings(maps, used, run=run)
        fidelity = _fidelity(done.encoder, suspect, used, whole, rest, run)
        job.output(ENCODER, partial(done.encoder.save, provenance=job.provenance()))
        if done.trigger is not None:
            job.output(RECOVERED, partial(save_trigger, done.trigger))
        job.output(ARRAYS, partial(write_arrays, arrays))
        record = job.finish(
            result_encoder=encoder_facts(done.encoder),
            fidelity=fidelity,
            evidence=done.evidence,
            history=done.history,
        )
    return PurifyResult(record, done.encoder, done)


def _fidelity(
    student: Encoder, teacher: Encoder, used: ImageSet, whole: ImageSet, rest: torch.Tensor, run: Run
) -> dict[str, Any]:
    """Measured on images that were not used, if enough are left; the record says on which."""
    held_out = len(rest) >= _FEWEST
    images = whole.subset(rest[:_HELD_OUT]) if held_out else used
    if len(images) < _FEWEST:
        return {"source": f"not measured: fewer than {_FEWEST} images"}
    source = "images not used to purify" if held_out else "the images used to purify; there were no others"
    return {
        "source": source,
        **label_free_fidelity(student, teacher, images, run=run).model_dump(mode="json"),
    }
