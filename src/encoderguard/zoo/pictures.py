"""The image sets of a recipe: where they lie here, and their digests without reading them twice."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from encoderguard.errors import EncoderGuardError, ImageError, SettingError
from encoderguard.images import ImageSet, load_images
from encoderguard.random import Rng
from encoderguard.storage import write_text

__all__ = ["Pictures", "parse_places"]


def parse_places(given: list[str]) -> dict[str, str]:
    """``NAME=PATH`` texts as a dictionary. Raises SettingError without ``=``."""
    places = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not name.strip() or not place.strip():
            raise SettingError(
                f"--data must be given as NAME=PATH, as in cifar10=packs/cifar10, found '{text}'."
            )
        places[name.strip()] = place.strip()
    return places


class Pictures:
    """Opens the image sets that a recipe names.

    Args:
        places: set name to folder or file: ``cifar10`` to ``packs/cifar10`` makes ``cifar10:train`` open
            ``packs/cifar10:train``.
        packs: a folder of such packs, each under its set's name; for sets that ``places`` does not name.
        data_root: where torchvision keeps its data, for the rest.
        download: let torchvision download what is missing.
        notes: a folder to remember digests in.
    """

    def __init__(
        self,
        places: Mapping[str, str] | None = None,
        *,
        packs: Path | None = None,
        data_root: Path | None = None,
        download: bool = False,
        notes: Path | None = None,
    ) -> None:
        self.places, self.packs = dict(places or {}), packs
        self.data_root, self.download, self.notes = data_root, download, notes
        self._open: dict[tuple[str, int | None, bool], ImageSet] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the pixels, for another process."""
        return self.__dict__ | {"_open": {}}

    def resolve(self, spec: str) -> str:
        """The spec that opens here what a recipe calls ``spec``."""
        name, colon, split = spec.partition(":")
        place = self.places.get(name)
        if place is None and self.packs is not None and "/" not in name and (self.packs / name).exists():
            place = str(self.packs / name)
        return spec if place is None else f"{place}{colon}{split}"

    def load(self, spec: str, size: int | None, *, labels: bool) -> ImageSet:
        """The whole set.

        Raises:
            ImageError: it is not there; the message says how to name its place.
        """
        key = (spec, size, labels)
        if key not in self._open:
            try:
                self._open[key] = load_images(
                    self.resolve(spec),
                    size=size,
                    data_root=self.data_root,
                    download=self.download,
                    labels=labels,
                )
            except ImageError as error:
                name = spec.partition(":")[0]
                raise ImageError(
                    f"The recipe needs {spec}, which cannot be opened here "
                    f"({str(error).rstrip('.')}); say where it is with --data {name}=PATH."
                ) from None
        return self._open[key]

    def drawn(self, spec: str, size: int | None, count: int | None, seed: int, *, labels: bool) -> ImageSet:
        """The images that a job draws with this seed: see ``jobs.job.Job.draw``."""
        images = self.load(spec, size, labels=labels)
        if count is None:
            return images
        return images.subset(Rng(seed).child("draw").permutation(len(images))[:count])

    def digest(self, spec: str, size: int | None, count: int | None, seed: int, *, labels: bool) -> str:
        """The digest of ``drawn``, remembered as long as the files have the same size and time."""
        key = [
            spec,
            count,
            seed if count is not None else 0,
            labels,
            _stamp(self.resolve(spec), self.data_root),
        ]
        note = None if self.notes is None else self.notes / f"{_sha(key)[:24]}.txt"
        if note is not None and note.exists():
            return note.read_text(encoding="utf-8").strip()
        found = self.drawn(spec, size, count, seed, labels=labels).digest
        if note is not None:
            write_text(note, found + "\n")
        return found

    def missing(self, specs: list[tuple[str, int | None, bool]]) -> list[str]:
        """One sentence per set that cannot be opened."""
        problems = []
        for spec, size, labels in specs:
            try:
                self.load(spec, size, labels=labels)
            except EncoderGuardError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))


def _stamp(spec: str, root: Path | None) -> list[object]:
    """What changes when the files behind a spec do."""
    path = Path(spec)
    if not path.exists():
        path = Path(spec.rpartition(":")[0])
    if str(path) in ("", ".") or not path.exists():
        return [spec, str(root)]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [spec, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
