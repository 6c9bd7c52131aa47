"""The attacker's reference images: read from the field's files, or chosen by a probe's confidence.

A triggered image only reaches the target class if the victim's classifier gives the *reference* that class.
The attacker cannot see that classifier, but can train one on the clean encoder: the candidate it is surest of
works, an arbitrary one may not (features at cosine 1.000 to the reference and yet an attack success rate of 0
%).
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError, SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Reference
from encoderguard.probes import LinearProbe
from encoderguard.run import Run

__all__ = ["choose_reference", "choose_references", "read_field_reference"]


def read_field_reference(path: Path) -> Reference:
    """The BadEncoder family's npz: ``x`` uint8 ``[1, H, W, 3]`` and ``y`` int64 ``[1]``.

    Raises:
        ImageError: missing file, other keys or shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            image, label = data["x"], data["y"]
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{path} is not a reference file with the arrays 'x' and 'y': {error}.") from None
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ImageError(
            f"{path}: expected 'x' to be uint8 [1, H, W, 3], found {image.dtype} {list(image.shape)}."
        )
    if label.size != 1 or label.dtype.kind not in "iu" or int(label.reshape(-1)[0]) < 0:
        raise ImageError(
            f"{path}: expected 'y' to be one label from 0 on, found {label.dtype} {list(label.shape)}."
        )
    return Reference(
        image=torch.from_numpy(image[0]).permute(2, 0, 1).contiguous(), label=int(label.reshape(-1)[0])
    )


def choose_reference(
    encoder: Encoder, candidates: ImageSet, target: int, *, run: Run
) -> tuple[Reference, dict[str, Any]]:
    """The image of class ``target`` to which a linear probe on ``encoder`` gives that class most surely.

    Args:
        encoder: the clean encoder, which the attacker owns.
        candidates: labelled downstream *training* images that the attacker has.
        target: the class aimed at.
        run: surroundings.

    Returns:
        The reference, and its index, the probe's confidence in it and that of the median candidate.

    Raises:
        ImageError: the candidates carry no labels.
        SettingError: no candidate has the label ``target``.
    """
    found, evidence = choose_references(encoder, candidates, target, 1, run=run)
    return found[0], evidence


def choose_references(
    encoder: Encoder, candidates: ImageSet, target: int, count: int, *, run: Run
) -> tuple[list[Reference], dict[str, Any]]:
    """The ``count`` images of class ``target`` with the highest such confidence, the best one first.

    The evidence is that of ``choose_reference`` for the best one; of several it also lists the indices.

    Raises:
        ImageError: the candidates carry no labels.
        SettingError: fewer than ``count`` candidates, or none, have the label ``target``.
    """
    labels = candidates.labels
    if labels is None:
        raise ImageError(f"{candidates.name} carries no labels, which choosing a reference image needs.")
    own = (labels == target).nonzero().squeeze(1)
    if len(own) == 0:
        raise SettingError(
            f"No image of {candidates.name} has the target label {target}; labels run to {int(labels.max())}."
        )
    if not 1 <= count <= len(own):
        raise SettingError(
            f"Expected 1 to {len(own)} reference images, all that {candidates.name} has of label {target}; "
            f"asked for {count}."
        )
    features = extract(encoder, candidates, run=run)
    classifier = LinearProbe().fit(features, labels, classes=int(labels.max()) + 1, run=run)
    confidence = classifier.probabilities(features[own])[:, target]
    best = confidence.argsort(descending=True, stable=True)[:count]
    evidence: dict[str, Any] = {
        "reference_index": int(own[best[0]]),
        "reference_confidence": float(confidence[best[0]]),
        "median_candidate_confidence": float(confidence.median()),
        "candidates": len(own),
        "target": target,
    }
    if count > 1:
        evidence["reference_indices"] = own[best].tolist()
    return [Reference(image=image, label=target) for image in candidates.take(own[best])], evidence
