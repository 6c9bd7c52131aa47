"""What the data-poisoning attacks share: how many, which, stamping without loss, the set and its manifest."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from encoderguard.errors import ImageError, SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.run import Run
from encoderguard.triggers import Trigger, stamp_uint8

__all__ = [
    "Base",
    "Quota",
    "Share",
    "base_of",
    "class_name",
    "digest_of",
    "draw",
    "of_class",
    "others",
    "poisoned",
    "quota",
    "replaced",
]

Share = Literal["class", "dataset"]
"""What a poisoning rate is a share of: the images of the class aimed at, or all images."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A poisoner's own copy of a training set."""

    source: ImageSet
    pixels: Tensor
    """uint8 ``[N, 3, H, W]``; may be written to."""
    labels: Tensor
    """int64 ``[N]``; may be written to."""
    target: int

    @property
    def target_name(self) -> str:
        """The class aimed at, for messages."""
        return class_name(self.source, self.target)


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How many poisons, and what that is a share of."""

    asked: float
    of: Share
    denominator: int
    count: int


def class_name(images: ImageSet, label: int) -> str:
    """The name of a class, or ``class 3`` where names are not known."""
    return images.classes[label] if label < len(images.classes) else f"class {label}"


def base_of(images: ImageSet, target: int, attack: str) -> Base:
    """Copy a labelled training set.

    Raises:
        ImageError: it has no labels, no image of the class aimed at, or canvases (it is poisoned already).
    """
    if images.labels is None:
        raise ImageError(
            f"{attack} must know which images are of the class aimed at, but {images.name} has no labels; "
            "give a labelled training set."
        )
    if images.canvases is not None:
        raise ImageError(f"{images.name} is a poisoned set with appended canvases; give the clean set.")
    labels = images.labels.clone()
    if not bool((labels == target).any()):
        found = ", ".join(str(label) for label in sorted(set(labels.tolist()))[:20])
        raise ImageError(
            f"{images.name} has no image of class {target}; its labels are {found}: aim at one of these."
        )
    return Base(source=images, pixels=images.take(range(len(images))), labels=labels, target=target)


def of_class(base: Base) -> Tensor:
    """Indices of the images of the class aimed at."""
    return torch.nonzero(base.labels == base.target).flatten()


def others(base: Base, attack: str) -> Tensor:
    """Indices of the images of other classes.

    Raises:
        ImageError: there are none.
    """
    found = torch.nonzero(base.labels != base.target).flatten()
    if not len(found):
        raise ImageError(
            f"{attack} needs images of other classes than {base.target_name}, "
            f"but {base.source.name} has none; give a training set with several classes."
        )
    return found


def quota(
    base: Base, rate: float, *, of: Share = "dataset", most: int | None = None, name: str = ""
) -> Quota:
    """``round(rate * denominator)`` poisons.

    Args:
        base: the training set.
        rate: in (0, 1].
        of: what the rate is a share of.
        most: images that may be poisoned; None if poisons are appended.
        name: what these are, for messages.

    Raises:
        SettingError: that is no image, or more than may be poisoned.
    """
    source = base.source
    denominator = len(of_class(base)) if of == "class" else len(source)
    whole = f"the {denominator} images of {base.target_name if of == 'class' else source.name}"
    count = round(rate * denominator)
    if count < 1:
        raise SettingError(
            f"A rate of {rate:g} of {whole} is no image; give a rate of at least {1 / denominator:.2g}."
        )
    if most is not None and count > most:
        raise SettingError(
            f"A rate of {rate:g} of {whole} asks for {count} poisons, but there are only {most} {name}; "
            f"give a rate of at most {most / denominator:.3g}."
        )
    return Quota(asked=rate, of=of, denominator=denominator, count=count)


def draw(candidates: Tensor, count: int, run: Run, *, name: str = "poisons") -> Tensor:
    """``count`` of the candidates drawn with the seed, in ascending order."""
    return candidates[run.rng.permutation(len(candidates), name)[:count]].sort().values


def replaced(
    base: Base,
    trigger: Trigger,
    chosen: Tensor,
    *,
    relabel: bool = False,
    generator: torch.Generator | None = None,
) -> list[dict[str, Any]]:
    """Stamp images in the copy and perhaps give them the target's label; returns their manifest entries."""
    base.pixels[chosen] = stamp_uint8(trigger, base.pixels[chosen], generator)
    before = base.labels[chosen].tolist()
    if relabel:
        base.labels[chosen] = base.target
    return [
        {"index": index, "source_index": index, "label_before": old, "label_after": new}
        for index, old, new in zip(chosen.tolist(), before, base.labels[chosen].tolist(), strict=True)
    ]


def poisoned(
    method: DataPoisoning,
    base: Base,
    trigger: Trigger,
    entries: Sequence[Mapping[str, Any]],
    *,
    rate: Quota,
    run: Run,
    canvases: Tensor | None = None,
    captions: Sequence[str] | None = None,
    **facts: Any,
) -> Poisoned:
    """The poisoned set with its manifest.

    Args:
        method: the attack, for its name and settings.
        base: the copy, with its poisons in place.
        trigger: what sets the backdoor off at test time.
        entries: one per poison; ``index`` says where it is in the poisoned set.
        rate: what was asked for.
        run: for the seed.
        canvases: what was appended, uint8 ``[M, 3, H', W']``.
        captions: of the poisoned set; those of the source by default.
        facts: further values for the manifest.
    """
    source = base.source
    images = ImageSet.from_arrays(
        base.pixels,
        base.labels,
        source.classes,
        name=f"{source.name} ({method.name})",
        canvases=canvases,
        captions=source.captions if captions is None else captions,
    )
    achieved = len(entries) / rate.denominator
    shares = {"asked": rate.asked, "achieved": achieved, "of": rate.of, "denominator": rate.denominator}
    described = trigger.to_dict()
    manifest: dict[str, Any] = {
        "attack": method.name,
        "settings": method.settings(),
        "seed": run.rng.seed,
        "target": base.target,
        "target_name": base.target_name,
        "mode": "replace" if canvases is None else "append",
        "rate": shares | {"poisons": len(entries)},
        "counts": _counts(base, entries, canvases),
        "source": {"name": source.name, "spec": source.spec, "digest": source.digest},
        "digest": images.digest,
        "trigger": {"kind": described.get("kind"), "digest": digest_of(described)},
        **facts,
        "entries": [dict(entry) for entry in entries],
    }
    indices = torch.tensor([entry["index"] for entry in entries], dtype=torch.int64)
    return Poisoned(images=images, trigger=trigger, indices=indices, manifest=manifest)


def _counts(base: Base, entries: Sequence[Mapping[str, Any]], canvases: Tensor | None) -> dict[str, int]:
    appended = 0 if canvases is None else len(canvases)
    return {
        "images": len(base.pixels),
        "replaced": len(entries) - appended,
        "appended": appended,
        "relabelled": sum(entry["label_before"] != entry["label_after"] for entry in entries),
        "recaptioned": sum("caption_after" in entry for entry in entries),
    }


def digest_of(description: Mapping[str, Any]) -> str:
    """The sha256 of a trigger's description, as ``evaluate`` records it."""
    return hashlib.sha256(repr(dict(description)).encode()).hexdigest()
