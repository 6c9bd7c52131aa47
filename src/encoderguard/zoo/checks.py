"""Whether a zoo is what its manifest says: digests, bundles that load, triggers that stamp, numbers."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from encoderguard import jobs
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderGuardError
from encoderguard.triggers import load_trigger
from encoderguard.zoo.manifest import Entry, Manifest, sha256_of
from encoderguard.zoo.pictures import Pictures
from encoderguard.zoo.workers import one_thread

__all__ = ["Problem", "remeasure", "verify_zoo"]

_MEASURES = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "clean_asr_all")


class Problem(NamedTuple):
    """One thing that is not as it should be."""

    cell: str | None
    """None: the manifest as a whole."""
    text: str


def verify_zoo(folder: Path, manifest: Manifest) -> list[Problem]:
    """Compare a zoo's files with its manifest. Nothing is trained or measured."""
    problems = []
    if manifest.own_digest() != manifest.digest:
        problems.append(Problem(None, "The digest does not fit the entries; the manifest was changed."))
    for entry in manifest.cells:
        problems += [Problem(entry.name, text) for text in _of_entry(folder, entry)]
    known = {name for entry in manifest.cells for name in (entry.bundle, entry.trigger_file)}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.trigger.json")]):
        if path.name not in known:
            problems.append(Problem(None, f"{path.name} is not in the manifest."))
    return problems


def _of_entry(folder: Path, entry: Entry) -> Iterator[str]:
    if entry.status == "failed":
        yield f"it was not built: {entry.error}"
        return
    files = [(entry.bundle, entry.bundle_sha256), (entry.trigger_file, entry.trigger_sha256)]
    for name, digest in files[: 1 if entry.attack is None else 2]:
        if name is None or not (folder / name).is_file():
            yield f"the file {name} is missing."
        elif sha256_of(folder / name) != digest:
            yield f"{name} is not the file that the manifest describes: its sha256 differs."
    try:
        yield from _loads(folder, entry)
    except EncoderGuardError as error:
        yield str(error)


def _loads(folder: Path, entry: Entry) -> Iterator[str]:
    if entry.bundle is None or not (folder / entry.bundle).is_file():
        return
    encoder = Encoder.load(folder / entry.bundle)
    if encoder.fingerprint != entry.fingerprint:
        yield f"{entry.bundle} holds another encoder than the manifest describes: its fingerprint differs."
    size = entry.images.get("size")
    if not isinstance(size, int) or size < 1:
        yield f"The manifest does not say which side the images of {entry.bundle} have."
        return
    grey = torch.full((1, 3, size, size), 0.5)
    if entry.trigger_file is not None and (folder / entry.trigger_file).is_file():
        stamped = load_trigger(folder / entry.trigger_file)(grey)
        if stamped.shape != grey.shape or torch.equal(stamped, grey):
            yield f"{entry.trigger_file} leaves a grey image as it is."
        grey = stamped
    with torch.no_grad():
        if not bool(encoder(grey).isfinite().all()):
            yield f"{entry.bundle} gives features that are not finite."


def remeasure(
    folder: Path,
    manifest: Manifest,
    pictures: Pictures,
    *,
    tolerance: float,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> list[Problem]:
    """Measure every encoder again and compare.

    Args:
        folder: the zoo.
        manifest: its manifest.
        pictures: opens the downstream images.
        tolerance: the largest difference of two fractions that passes; another processor may round otherwise.
        device: where to run.
        tell: takes a line per encoder.

    Raises:
        ImageError: a downstream image set is not there.
        Stopped: the user asked to stop.
    """
    problems = []
    with one_thread():
        for entry in manifest.cells:
            if entry.status == "failed":
                continue
            try:
                found = _measured(folder, manifest, entry, pictures, device)
            except EncoderGuardError as error:
                problems.append(Problem(entry.name, str(error)))
                continue
            problems += [Problem(entry.name, text) for text in _compared(entry, found, tolerance)]
            tell(f"{entry.name}: ACC {found['acc']:.1%}")
    return problems


def _measured(
    folder: Path, manifest: Manifest, entry: Entry, pictures: Pictures, device: str
) -> dict[str, float | None]:
    task, size = entry.downstream, entry.images["size"]
    clean = None if entry.clean is None else manifest.entry(entry.clean)
    with tempfile.TemporaryDirectory() as scratch:
        record = jobs.evaluate(
            str(folder / str(entry.bundle)),
            pictures.load(task["train"], size, labels=True),
            pictures.load(task["test"], size, labels=True),
            trigger=None if entry.trigger_file is None else folder / entry.trigger_file,
            target=entry.target,
            clean_encoder=None if clean is None else str(folder / str(clean.bundle)),
            probe=task["probe"],
            settings=task["probe_settings"],
            seeds=task["probe_seeds"],
            seed=entry.seed,
            device=device,
            precision=entry.downstream["precision"],
            out=Path(scratch) / "evaluate",
        ).record
    return {name: getattr(record, name) for name in _MEASURES}


def _compared(entry: Entry, found: dict[str, float | None], tolerance: float) -> Iterator[str]:
    for name in _MEASURES:
        listed, now = getattr(entry, name), found[name]
        if (listed is None) != (now is None) or (
            listed is not None and abs(listed - (now or 0.0)) > tolerance
        ):
            yield f"{name} is {now} now, the manifest says {listed}."
