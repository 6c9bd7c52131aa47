"""What a cell of each kind computes, by the jobs that everybody uses.

This is where oracles would leak, so what a detector or a defense is handed is made here: an encoder object
without its file, and images without labels; ``computing`` adds a folder to work in that lies apart from the
store. Trigger and target go to attacks and to evaluations only.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import Store, file_digest
from encoderguard.encoder import Encoder
from encoderguard.errors import UsageError
from encoderguard.images import ImageSet, load_images
from encoderguard.information import layer_profile
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.results import Record
from encoderguard.run import Run, resolve_device
from encoderguard.storage import prepare_folder
from encoderguard.triggers import Trigger, load_trigger

__all__ = ["JOBS", "Places", "open_images", "place_of"]

_BUNDLE, _TRIGGER, _POISONED = "encoder.safetensors", "trigger.json", "poisoned.npz"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where data are and on what to compute: nothing that a result may depend on."""

    packs: str | None = None
    """Folder whose subfolders are image sets by name: ``gtsrb:train`` is then ``PACKS/gtsrb:train``."""
    data_root: str | None = None
    """Where torchvision keeps its data."""
    download: bool = False
    device: str = "auto"


def place_of(spec: str, places: Places) -> str:
    """``spec``, or the pack of that name if there is one."""
    name, _, split = spec.partition(":")
    if places.packs is not None and (Path(places.packs) / name).is_dir():
        return f"{Path(places.packs) / name}:{split}"
    return spec


def open_images(spec: str, places: Places, *, size: int | None = None, labels: bool = False) -> ImageSet:
    """The image set of a spec. Raises ImageError as ``load_images``."""
    root = None if places.data_root is None else Path(places.data_root)
    return load_images(
        place_of(spec, places), size=size, data_root=root, download=places.download, labels=labels
    )


def _pretrain(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    extra, poisoned = cell.extra, cell.needs.get("images")
    model = {name: extra[name] for name in ("architecture", "width", "stem", "normalisation")}
    if poisoned is not None:
        images, count = str(store.folder(poisoned) / _POISONED), None
    else:
        images, count = place_of(cell.data["images"], places), extra["count"]
    done = jobs.pretrain(images, method=cell.method, settings=cell.settings, count=count, **options | model)
    return _lean(done.record)


def _attack(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    done = jobs.attack(
        str(store.folder(cell.needs["encoder"]) / _BUNDLE),
        place_of(cell.data["images"], places),
        method=cell.method,
        settings=cell.settings,
        downstream=place_of(cell.data["downstream"], places),
        target=cell.extra["target"],
        count=cell.extra["count"],
        **options,
    )
    return _lean(done.record)


def _poison(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    done = jobs.poison(
        place_of(cell.data["images"], places),
        method=cell.method,
        settings=cell.settings,
        target=cell.extra["target"],
        count=cell.extra["count"],
        **options,
    )
    return _lean(done.record)


def _adopt(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    """Copy an encoder of a zoo, and its trigger, after comparing them with the manifest."""
    folder, names = prepare_folder(store.folder(cell)), {"encoder": _BUNDLE, "trigger": _TRIGGER}
    for role, path in cell.data.items():
        try:
            shutil.copyfile(path, folder / names[role])
        except OSError as error:
            raise UsageError(f"{path} cannot be copied: {error.strerror}; is the zoo whole?") from None
        if file_digest(folder / names[role]) != cell.digests[role]:
            raise UsageError(f"{path} is not what the zoo's manifest describes; run 'zoo verify'.")
    return {"job": "adopt", **cell.extra}


def _suspect(cell: Cell, store: Store) -> Encoder:
    """Weights and preprocessing alone: neither the file's path nor the provenance inside it."""
    if "encoder" in cell.data:
        return load_encoder(cell.data["encoder"])
    return load_encoder(str(store.folder(cell.needs["encoder"]) / _BUNDLE))


def _scan(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    images = open_images(cell.data["images"], places, size=options["image_size"])
    done = jobs.scan(
        _suspect(cell, store),
        images,
        detector=cell.method,
        settings=cell.settings,
        count=cell.extra["count"],
        **options,
    )
    return _lean(done.record)


def _purify(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    images = open_images(cell.data["images"], places, size=options["image_size"])
    if "stamped" in cell.extra:
        images = _stamped(images, cell, store)
    done = jobs.purify(
        _suspect(cell, store),
        images,
        defense=cell.method,
        settings=cell.settings,
        count=cell.extra["count"],
        **options,
    )
    return _lean(done.record)


def _stamped(images: ImageSet, cell: Cell, store: Store) -> ImageSet:
    """The images that the defense draws, a share of them with the trigger on: a clean set that is not.

    In such an order that the job, which draws again, ends at the images of a clean set in their order.
    """
    rng, drawing = Rng(cell.seed).child("stamped"), Rng(cell.seed).child("draw")
    count = min(cell.extra["count"], len(images))
    places = torch.empty(count, dtype=torch.int64)
    places[drawing.permutation(count)] = drawing.permutation(len(images))[:count]
    pixels = images.take(places)
    chosen = rng.permutation(count, "which")[: round(cell.extra["stamped"] * count)]
    trigger = load_trigger(store.folder(cell.needs["trigger"]) / _TRIGGER)
    pixels[chosen] = (trigger(pixels[chosen].float() / 255) * 255).round().to(pixels.dtype)
    return ImageSet.from_arrays(pixels, name=images.name)


def _evaluate(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    trigger = cell.needs.get("trigger")
    done = jobs.evaluate(
        str(store.folder(cell.needs["encoder"]) / _BUNDLE),
        place_of(cell.data["train"], places),
        place_of(cell.data["test"], places),
        trigger=None if trigger is None else store.folder(trigger) / _TRIGGER,
        target=cell.extra.get("target"),
        clean_encoder=str(store.folder(cell.needs["clean_encoder"]) / _BUNDLE),
        probe=cell.method,
        settings=cell.settings,
        **options,
    )
    return _lean(done.record)


def _profile(cell: Cell, store: Store, places: Places, options: dict[str, Any]) -> dict[str, Any]:
    """MIMIC's Figure 3: an analysis that knows the trigger, not a defense."""
    run = Run(rng=Rng(cell.seed), device=resolve_device(places.device))
    images = open_images(cell.data["images"], places, size=options["image_size"])
    chosen = images.sample(min(cell.extra["count"], len(images)), run.rng.child("profile"))
    pixels = chosen.take(range(len(chosen))).float() / 255
    triggered = cell.needs.get("trigger")
    kinds: dict[str, Trigger | None] = {"clean": None}
    if triggered is not None:
        kinds["triggered"] = load_trigger(store.folder(triggered) / _TRIGGER)
    encoder = _suspect(cell, store)
    store.folder(cell).mkdir(parents=True, exist_ok=True)
    return {
        "job": "profile",
        "profiles": {
            f"{measure} {kind}": layer_profile(
                encoder, pixels, measure=measure, run=run, trigger=stamp
            ).model_dump(mode="json")
            for measure in ("mine", "cka")
            for kind, stamp in kinds.items()
        },
    }


JOBS: dict[str, Callable[[Cell, Store, Places, dict[str, Any]], dict[str, Any]]] = {
    "pretrain": _pretrain,
    "attack": _attack,
    "poison": _poison,
    "adopt": _adopt,
    "scan": _scan,
    "purify": _purify,
    "evaluate": _evaluate,
    "profile": _profile,
}
"""By job: computes a cell with the options of the job, into the folder ``out``; gives its record."""


def _lean(record: Record) -> dict[str, Any]:
    """The record without its curves, and with folders cut off: what is reviewed in a pull request."""
    facts: dict[str, Any] = record.model_dump(mode="json")
    facts.pop("history", None)
    facts.get("evidence", {}).pop("curves", None)
    facts["folder"] = None
    return facts
