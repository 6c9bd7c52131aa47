"""The job that makes a poisoned training set, to train encoders on and to test filters with."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.jobs.facts import image_facts
from encoderguard.jobs.folder import ARRAYS, MANIFEST, POISONED, TRIGGER
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import Arrays, poisons, write_arrays
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.results import PoisonRecord
from encoderguard.storage import write_text
from encoderguard.triggers import save_trigger

__all__ = ["PoisonResult", "poison", "poisoned_arrays"]


class PoisonResult(NamedTuple):
    """What ``poison`` returns."""

    record: PoisonRecord
    poisoned: Poisoned


def poison(
    images: ImageSet | str,
    *,
    method: str | DataPoisoning,
    target: int,
    settings: Mapping[str, Any] | None = None,
    references: ImageSet | str | None = None,
    count: int | None = None,
    **options: Unpack[JobOptions],
) -> PoisonResult:
    """Poison a copy of a labelled training set, to train an encoder on it and test what finds the backdoor.

    Args:
        images: the clean labelled training set or its spec.
        method: name of a data-poisoning attack, or the attack itself.
        target: the label aimed at.
        settings: of the named attack.
        references: pictures of the class aimed at, or their spec, for attacks that paste such pictures; by
            default those in ``images``.
        count: images to draw with the seed before they are poisoned; None takes all.
        options: see JobOptions. ``out`` receives ``poisoned.npz``, ``manifest.json``, ``trigger.json``, the
            record and the report.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the files cannot be written.
        Stopped: the user asked to stop.
    """
    with Job(PoisonRecord, options) as job:
        chosen = job.method("attack", method, settings)
        if not isinstance(chosen, DataPoisoning):
            raise SettingError(
                f"'{chosen.name}' fine-tunes an encoder and poisons no training set; "
                f"use 'encoderguard attack {chosen.name} ENCODER'."
            )
        clean, _ = job.draw(job.images(images, labels=True), count)
        given = None if references is None else job.images(references)
        job.note(target=target)
        job.note(reference_images=None if given is None else image_facts(given))
        job.begin(target=target, references=None if given is None else given.digest)
        with job.timing() as run:
            done = chosen.poison(clean, target, run=run, references=given)
        manifest = done.manifest
        job.output(POISONED, partial(write_arrays, poisoned_arrays(done.images)))
        job.output(MANIFEST, lambda path: write_text(path, json.dumps(manifest, indent=1) + "\n"))
        job.output(TRIGGER, partial(save_trigger, done.trigger))
        job.output(ARRAYS, partial(write_arrays, poisons(clean, done)))
        record = job.finish(
            poisoned_images=image_facts(done.images),
            **{key: manifest[key] for key in ("target_name", "trigger", "rate", "counts")},
        )
    return PoisonResult(record, done)


def poisoned_arrays(images: ImageSet) -> Arrays:
    """What ``poisoned.npz`` holds, as ``load_images`` reads it.

    ``images`` uint8 ``[N, H, W, 3]``; ``labels`` int64 ``[N]``, ``classes`` text, ``canvases`` uint8
    ``[M, H', W', 3]`` and ``captions`` text ``[N]`` where the set has them.
    """
    found: Arrays = {"images": _last(images.take(range(len(images))))}
    if images.labels is not None:
        found["labels"] = images.labels.numpy()
    if images.classes:
        found["classes"] = np.array(images.classes, dtype=np.str_)
    if images.canvases is not None:
        found["canvases"] = _last(images.canvases)
    if images.captions is not None:
        found["captions"] = np.array(images.captions, dtype=np.str_)
    return found


def _last(pixels: Tensor) -> NDArray[np.generic]:
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
