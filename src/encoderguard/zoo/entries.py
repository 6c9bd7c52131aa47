"""The files of a cell in the zoo, and its entry in the manifest."""

import filecmp
import json
import tempfile
from pathlib import Path
from typing import Any

from encoderguard.encoder import Encoder
from encoderguard.registry import create
from encoderguard.results import EvaluateRecord, Record
from encoderguard.storage import write_atomic
from encoderguard.triggers import load_trigger
from encoderguard.zoo.manifest import Entry, band, sha256_of
from encoderguard.zoo.recipe import Cell

__all__ = ["Files", "entry_of", "failed_entry", "identity_of"]

_MEASURES = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "clean_asr_all", "target_name")
_RUN = ("created", "device", "device_name", "threads", "cpu", "platform", "commit", "dirty", "versions")
_SHORT = 300  # characters of a trigger's description that the manifest repeats


class Files:
    """The bundle and the trigger of a cell in the zoo's folder."""

    def __init__(self, zoo: Path, cell: str, *, triggered: bool) -> None:
        self.bundle, self.trigger = zoo / f"{cell}.safetensors", zoo / f"{cell}.trigger.json"
        self.triggered = triggered

    def hold(self, encoder: Encoder, provenance: dict[str, Any], trigger: Path | None) -> bool:
        """Whether both are already there, byte for byte."""
        with tempfile.TemporaryDirectory() as folder:
            other = Files(Path(folder), "cell", triggered=self.triggered)
            other.store(encoder, provenance, trigger)
            pairs = [(self.bundle, other.bundle)] + [(self.trigger, other.trigger)] * self.triggered
            return all(mine.is_file() and filecmp.cmp(mine, new, shallow=False) for mine, new in pairs)

    def store(self, encoder: Encoder, provenance: dict[str, Any], trigger: Path | None) -> None:
        """Write both; the bundle as float16, with nothing in it that depends on the machine or the hour."""
        if trigger is not None:
            content = trigger.read_bytes()
            write_atomic(self.trigger, lambda part: _fill(part, content))
        encoder.save(self.bundle, provenance | {"source": encoder.fingerprint}, dtype="float16")

    def remove(self) -> None:
        """Leave nothing of a cell that failed."""
        for path in (self.bundle, self.trigger):
            path.unlink(missing_ok=True)


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def entry_of(cell: Cell, trained: Record, judged: Record, files: Files) -> Entry:
    """The manifest's entry of a finished cell."""
    assert isinstance(judged, EvaluateRecord)
    encoder = Encoder.load(files.bundle)
    own = encoder.spec.model_dump(
        mode="json", include={"architecture", "width", "stem", "input_size", "mean", "std"}
    )
    return Entry(
        **identity_of(cell),
        **_settings(cell),
        status="built",
        trigger=_trigger(cell, files),
        encoder=own,
        images=_images(cell, trained),
        downstream=_downstream(cell, judged),
        training={"epochs": trained.settings.get("epochs"), "last": _last(trained)},
        **{name: getattr(judged, name) for name in _MEASURES},
        band=band(judged.asr, judged.clean_asr),
        bundle=files.bundle.name,
        bundle_sha256=sha256_of(files.bundle),
        bundle_bytes=files.bundle.stat().st_size,
        fingerprint=encoder.fingerprint,
        trigger_file=files.trigger.name if files.triggered else None,
        trigger_sha256=sha256_of(files.trigger) if files.triggered else None,
        run={
            "training_seconds": trained.seconds,
            "evaluation_seconds": judged.seconds,
            **{name: getattr(trained, name) for name in _RUN},
        },
    )


def failed_entry(cell: Cell, error: str) -> Entry:
    """The manifest's entry of a cell that could not be made; settings as the recipe gives them."""
    given = {"settings": cell.settings, "pretrain_settings": cell.pretrain_settings}
    return Entry(**identity_of(cell) | given, status="failed", error=error)


def identity_of(cell: Cell) -> dict[str, Any]:
    """What the recipe calls the cell."""
    return cell.model_dump(
        mode="json", include={"name", "attack", "target", "references", "clean", "pretrain", "seed"}
    )


def _settings(cell: Cell) -> dict[str, Any]:
    attack = {} if cell.attack is None else create("attack", cell.attack, cell.settings).settings()
    pretrain = create("pretrain", cell.pretrain, cell.pretrain_settings).settings()
    return {"settings": attack, "pretrain_settings": pretrain}


def _trigger(cell: Cell, files: Files) -> dict[str, Any] | None:
    if cell.attack is None:
        return None
    described = load_trigger(files.trigger).to_dict()
    short = len(json.dumps(described)) <= _SHORT
    return {"variant": cell.trigger, **(described if short else {"kind": described.get("kind")})}


def _images(cell: Cell, trained: Record) -> dict[str, Any]:
    facts = trained.images
    assert facts is not None
    return {"spec": cell.task.images, "count": facts.count, "size": facts.height, "digest": facts.digest}


def _downstream(cell: Cell, judged: EvaluateRecord) -> dict[str, Any]:
    assert judged.images is not None
    assert judged.test_images is not None
    return {
        "train": cell.task.downstream_train,
        "train_digest": judged.images.digest,
        "test": cell.task.downstream_test,
        "test_digest": judged.test_images.digest,
        "probe": judged.method,
        "probe_settings": judged.settings,
        "probe_seeds": judged.seeds,
        "precision": judged.precision,
    }


def _last(trained: Record) -> dict[str, float | None]:
    history: dict[str, list[float | None]] = getattr(trained, "history", {})
    return {name: values[-1] for name, values in history.items() if values}
