"""The manifest of a zoo: what each encoder is, what was measured, and digests of every file."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from encoderguard.errors import UsageError
from encoderguard.storage import write_text

__all__ = [
    "MANIFEST",
    "Entry",
    "Manifest",
    "band",
    "find_manifests",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

MANIFEST = "manifest.json"
FORMAT = "encoderguard.zoo/1"
_BANDS = ((0.95, "strong"), (0.5, "medium"), (0.1, "weak"))
_ABOVE_CLEAN = 0.1
_VOLATILE = {"error", "run"}

Values = dict[str, Any]


def band(asr: float | None, clean_asr: float | None = None) -> str | None:
    """How well a backdoor works: strong from 95 %, medium from 50 %, weak from 10 %, else failed.

    Failed too if the clean encoder's ASR under the same trigger is less than 10 points lower: then the
    trigger does the work, not the backdoor.
    """
    if asr is None:
        return None
    if clean_asr is not None and asr - clean_asr < _ABOVE_CLEAN:
        return "failed"
    return next((label for least, label in _BANDS if asr >= least), "failed")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Entry(_Part):
    """One cell. ``run`` and ``error`` differ between machines and are not in the manifest's digest."""

    name: str
    status: Literal["built", "failed"]
    error: str | None = None
    """One sentence, if the cell failed."""
    attack: str | None = None
    """None for a clean encoder."""
    settings: Values = {}
    """All settings of the attack in effect."""
    trigger: Values | None = None
    """Kind of the trigger and the recipe's name for it."""
    target: int | None = None
    target_name: str | None = None
    references: int = 1
    """Reference images that the attack was given."""
    clean: str | None = None
    """Cell of the clean encoder that the attack started from, or is compared with."""
    pretrain: str
    pretrain_settings: Values = {}
    """All settings of the pre-training in effect."""
    seed: int
    encoder: Values = {}
    """Architecture and preprocessing."""
    images: Values = {}
    """Training images: spec, count, digest."""
    downstream: Values = {}
    """Training and test images of the probe, the probe and its settings."""
    training: Values = {}
    """Epochs and last value of each loss."""
    acc: float | None = None
    """Fraction of test images that get their own label; this and all below measured on the stored bundle."""
    asr: float | None = None
    """Fraction of stamped test images of other classes that get the target label."""
    asr_all: float | None = None
    """The same over all test images, those of the target class included."""
    clean_acc: float | None = None
    """Of the clean encoder, with a probe of its own."""
    clean_asr: float | None = None
    """Of the clean encoder under the same trigger: the floor of ``asr``."""
    clean_asr_all: float | None = None
    band: str | None = None
    """strong, medium, weak or failed, by ``asr``; None for a clean encoder."""
    bundle: str | None = None
    """File name beside the manifest."""
    bundle_sha256: str | None = None
    bundle_bytes: int | None = None
    fingerprint: str | None = None
    """Of the encoder as the bundle loads."""
    trigger_file: str | None = None
    trigger_sha256: str | None = None
    run: Values = {}
    """Seconds, date, machine, versions."""


class Manifest(_Part):
    """A zoo's table of contents."""

    format: str = FORMAT
    name: str
    title: str = ""
    digest: str = ""
    """sha256 over name and cells without what differs between machines and between runs."""
    cells: list[Entry] = []

    def entry(self, name: str) -> Entry | None:
        """The cell of that name."""
        return next((entry for entry in self.cells if entry.name == name), None)

    def own_digest(self) -> str:
        """What ``digest`` should be."""
        cells = [entry.model_dump(mode="json", exclude=_VOLATILE) for entry in self.cells]
        content = json.dumps({"format": self.format, "name": self.name, "cells": cells}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> Manifest:
    """Write ``manifest.json`` with its digest; returns it as written. Raises as ``write_atomic``."""
    sealed = manifest.model_copy(update={"digest": manifest.own_digest()})
    write_text(folder / MANIFEST, sealed.model_dump_json(indent=1) + "\n")
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a zoo's folder.

    Raises:
        UsageError: there is none, or it is not a manifest.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError:
        raise UsageError(
            f"There is no zoo in {folder}: it holds no {MANIFEST}; build one with 'zoo build'."
        ) from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UsageError(f"{path} is not a manifest: {where}: {fault['msg']}; build the zoo again.") from None


def find_manifests(root: Path) -> list[tuple[Path, Manifest]]:
    """Folder and manifest of every zoo in ``root``, or of ``root`` itself, by name."""
    folders = (
        [root] if (root / MANIFEST).exists() else sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    )
    return [(folder, read_manifest(folder)) for folder in folders]


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
