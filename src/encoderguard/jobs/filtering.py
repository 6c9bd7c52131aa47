"""The job of whoever holds a training set and the encoder trained on it: which pictures may be poison?"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.jobs.folder import ARRAYS, KEPT, RANKING
from encoderguard.jobs.job import Job
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.pictures import Arrays, write_arrays
from encoderguard.methods import Filter, Ranking
from encoderguard.results import FilterRecord
from encoderguard.storage import write_text

__all__ = ["FILTER_TOP", "FilterResult", "filter_images"]

FILTER_TOP = 100
"""Images that are dropped unless told otherwise."""
_NAMED = 100
"""Indices that the record holds; the file holds all."""
_SHOWN, _SIDE = 24, 128
"""Pictures in the report, and their largest side in pixels."""


class FilterResult(NamedTuple):
    """What ``filter_images`` returns."""

    record: FilterRecord
    ranking: Ranking
    kept: torch.Tensor
    """int64: the images that remain, ascending."""


def filter_images(
    encoder: Encoder | str,
    images: ImageSet | str,
    *,
    method: str | Filter = "patch_search",
    settings: Mapping[str, Any] | None = None,
    top: int = FILTER_TOP,
    **options: Unpack[JobOptions],
) -> FilterResult:
    """Rank the pictures of a training set by how likely they are poison, with the encoder trained on it.

    Args:
        encoder: the encoder, trained on ``images``, or its spec.
        images: the training set or its spec; labels are not looked at.
        method: name of a filter, or the filter itself.
        settings: of the named filter.
        top: how many of the most suspicious pictures are dropped.
        options: see JobOptions. ``out`` receives ``ranking.json``, ``kept.json``, the record and the report.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: the ranking failed.
        Stopped: the user asked to stop.
    """
    with Job(FilterRecord, options) as job:
        chosen: Filter = job.method("filter", method, settings)
        suspect = job.encoder(encoder)
        used, _ = job.draw(job.images(images), None)
        _check_top(top, used)
        used = _without_canvases(job, used)
        job.check(suspect, used)
        job.begin(top=top)
        with job.timing() as run:
            ranking = chosen.rank(suspect, used, run=run)
        order = ranking.scores.argsort(descending=True, stable=True)
        kept = order[top:].sort().values
        told = {"indices": order.tolist(), "scores": [round(s, 6) for s in ranking.scores[order].tolist()]}
        job.output(RANKING, lambda path: write_text(path, json.dumps(told) + "\n"))
        job.output(KEPT, lambda path: write_text(path, json.dumps({"indices": kept.tolist()}) + "\n"))
        job.output(ARRAYS, partial(write_arrays, _pictures(used, order)))
        record = job.finish(
            top=top,
            kept=len(kept),
            most_suspicious=order[: min(top, _NAMED)].tolist(),
            evidence=ranking.evidence,
        )
    return FilterResult(record, ranking, kept)


def _check_top(top: int, images: ImageSet) -> None:
    if not 1 <= top < len(images):
        raise SettingError(
            f"The number of images to drop must be from 1 to {len(images) - 1}, one less than {images.name} "
            f"holds; found {top}."
        )


def _without_canvases(job: Job[FilterRecord], images: ImageSet) -> ImageSet:
    if images.canvases is None:
        return images
    job.warn(f"The {len(images.canvases)} canvases appended to {images.name} are not looked at or ranked.")
    return ImageSet.from_arrays(images.take(torch.arange(len(images))), name=images.name)


def _pictures(images: ImageSet, order: torch.Tensor) -> Arrays:
    """The first of ``order``: uint8 ``[n, H, W, 3]``."""
    step = -(-max(images.shape) // _SIDE)
    pixels = images.take(order[:_SHOWN])[..., ::step, ::step]
    return {"images": pixels.permute(0, 2, 3, 1).contiguous().numpy()}
