"""Whether an encoder that lies in the zoo is what the recipe asks for, by the manifest alone.

Who clones a zoo has its bundles, not the jobs that made them. With this a cell can be added to such a zoo,
or one be changed, without training all the others again.
"""

import json
from typing import Any

from encoderguard.loading import spec_for
from encoderguard.probes import make_probe
from encoderguard.registry import Family, create
from encoderguard.zoo.cells import Maker
from encoderguard.zoo.entries import identity_of
from encoderguard.zoo.manifest import Entry, sha256_of

__all__ = ["stands"]

_PREPROCESSING = ("architecture", "width", "stem", "input_size", "mean", "std")


def stands(maker: Maker, entry: Entry) -> bool:
    """Whether files and entry are those that ``maker`` would make, as far as a manifest can tell.

    Settings that came after the entry count as their defaults. The caller sees to it that the cell's clean
    encoder stands too. A poisoned set is known by its size only, so a poisoner that appends pictures does
    not stand.

    Raises:
        ImageError: an image set is not there.
    """
    return entry.status == "built" and _whole(maker, entry) and _facts(maker) == _told(maker, entry)


def _whole(maker: Maker, entry: Entry) -> bool:
    pairs = [(maker.files.bundle, entry.bundle_sha256)]
    if maker.files.triggered:
        pairs.append((maker.files.trigger, entry.trigger_sha256))
    return all(path.is_file() and sha256_of(path) == digest for path, digest in pairs)


def _facts(maker: Maker) -> dict[str, Any]:
    """What the recipe asks for, in the manifest's words."""
    cell, task = maker.cell, maker.cell.task
    spec = spec_for(task.architecture, width=task.width, stem=task.stem, normalisation=task.normalisation)
    probe = make_probe(task.probe, **task.probe_settings)
    pictures = maker.site.pictures.drawn(task.images, task.image_size, task.count, cell.seed, labels=False)
    facts = {
        **identity_of(cell),
        "variant": cell.trigger,
        "settings": {} if cell.attack is None else create("attack", cell.attack, cell.settings).settings(),
        "pretrain_settings": create("pretrain", cell.pretrain, cell.pretrain_settings).settings(),
        "encoder": spec.model_dump(include=set(_PREPROCESSING)),
        "images": {"spec": task.images, "count": len(pictures), "size": pictures.shape[0]},
        "digest": None if cell.poisons_data else maker.digest(labels=maker.needs_labels),
        "downstream": {
            "train": task.downstream_train,
            "train_digest": maker.whole(task.downstream_train),
            "test": task.downstream_test,
            "test_digest": maker.whole(task.downstream_test),
            "probe": probe.name,
            "probe_settings": probe.settings(),
            "probe_seeds": task.probe_seeds if probe.stochastic else 1,
            "precision": task.precision,
        },
    }
    return dict(json.loads(json.dumps(facts)))


def _told(maker: Maker, entry: Entry) -> dict[str, Any]:
    """What the manifest says, in the same form."""
    cell = maker.cell
    images = dict(entry.images)
    digest = images.pop("digest", None)
    facts = {
        **{name: getattr(entry, name) for name in identity_of(cell)},
        "variant": (entry.trigger or {}).get("variant"),
        "settings": _with_later("attack", cell.attack, entry.settings),
        "pretrain_settings": _with_later("pretrain", cell.pretrain, entry.pretrain_settings),
        "encoder": {name: entry.encoder.get(name) for name in _PREPROCESSING},
        "images": images,
        "digest": None if cell.poisons_data else digest,
        "downstream": entry.downstream,
    }
    return dict(json.loads(json.dumps(facts)))


def _with_later(family: Family, method: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    return {} if method is None else create(family, method).settings() | settings
