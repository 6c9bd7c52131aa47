"""What all jobs share: loading, provenance, and a record whatever happens."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderGuardError, RunError, SettingError, UsageError
from encoderguard.images import ImageSet, load_images
from encoderguard.jobs.facts import encoder_facts, image_facts, machine_facts, passed_settings, precision_of
from encoderguard.jobs.folder import REPORT
from encoderguard.jobs.options import JobOptions, check_options, open_folder, surroundings
from encoderguard.loading import check_encoder, load_encoder, paths_in
from encoderguard.peers import require_even_shares
from encoderguard.provenance import forget_peak_memory, source_facts
from encoderguard.registry import Family, Method, create, method_class, method_names
from encoderguard.report import write_report
from encoderguard.results import Record
from encoderguard.run import Run

__all__ = ["Job"]

_LOG = logging.getLogger("encoderguard")
_CHECK_LEAST, _CHECK_MOST = 8, 128
R = TypeVar("R", bound=Record)
T = TypeVar("T")


class Job(Generic[R]):
    """One run, from its arguments to its record. A context manager: an error inside is recorded too."""

    def __init__(self, kind: type[R], options: JobOptions) -> None:
        check_options(options)
        forget_peak_memory()
        self._began, self._created = time.perf_counter(), datetime.now(UTC)
        self.options, self._kind = options, kind
        self.devices = options.get("devices", 1)
        run = surroundings(options)
        self.folder = open_folder(options)
        self.run = run if self.folder is None else replace(run, checkpoint=self.folder.checkpoint)
        self.facts: dict[str, Any] = {}
        """Fields of the record that are known already."""
        self._outputs: dict[str, Callable[[Path], object]] = {}
        self._finished = False

    def __enter__(self) -> "Job[R]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._finished or self.folder is None:
            return
        if isinstance(error, UsageError):
            self.folder.abandon()
            return
        stopped = isinstance(error, KeyboardInterrupt)
        text = str(error) if isinstance(error, EncoderGuardError) else f"{type(error).__name__}: {error}"
        record = self._record(
            status="interrupted" if stopped else "error", error="Stopped by the user." if stopped else text
        )
        self.folder.fail(record)

    def method(self, family: Family, given: str | Method, settings: Mapping[str, Any] | None) -> Any:
        """The method to run, noted in the record. Raises SettingError as ``registry.create``."""
        if isinstance(given, str):
            method, passed = create(family, given, settings), dict(settings or {})
        elif settings:
            raise SettingError("Settings go with a method's name; a method object has its own already.")
        else:
            method, passed = given, passed_settings(given)
        if self.devices > 1:
            _require_spreading(method, self.devices)
        self.note(method=method.name, settings=method.settings(), settings_passed=passed)
        return method

    def encoder(self, given: Encoder | str, field: str = "encoder") -> Encoder:
        """The encoder in eval mode on the CPU or where it is, noted in the record under ``field``."""
        encoder = given
        if isinstance(encoder, str):
            self.require_apart(encoder)
            size, normalisation = self.options.get("input_size"), self.options.get("normalisation")
            encoder = load_encoder(encoder, input_size=size, normalisation=normalisation)
        self.note(**{field: encoder_facts(encoder, given if isinstance(given, str) else None)})
        return encoder

    def images(self, given: ImageSet | str, *, labels: bool = False) -> ImageSet:
        """The whole image set. Raises ImageError as ``load_images``."""
        if isinstance(given, ImageSet):
            return given
        self.require_apart(given)
        root = self.options.get("data_root")
        return load_images(
            given,
            size=self.options.get("image_size"),
            data_root=None if root is None else Path(root),
            download=self.options.get("download", False),
            labels=labels,
            skip_unreadable=self.options.get("skip_unreadable", False),
        )

    def require_apart(self, given: str | Path) -> None:
        """The file that ``given`` names, if any, is not one that this run replaces. Raises OutputError."""
        if self.folder is not None:
            for path in paths_in(str(given)):
                self.folder.require_apart(path)

    def draw(
        self, images: ImageSet, count: int | None, usual: int | None = None
    ) -> tuple[ImageSet, torch.Tensor]:
        """``count`` images drawn with the seed, and the indices of the others in random order.

        Without ``count`` it is ``usual``; without either, all are used in their own order. Fewer are used,
        with a warning, if fewer are there.

        Raises:
            SettingError: ``count`` is below 1.
        """
        if count is not None and count < 1:
            raise SettingError(f"The number of images must be at least 1, found {count}.")
        wanted = count or usual
        if wanted is None:
            chosen, rest = images, torch.empty(0, dtype=torch.int64)
        else:
            if wanted > len(images):
                asked = "were asked for" if count else "are usual"
                self.warn(
                    f"{images.name} holds {len(images)} images where {wanted} {asked}; all of them are used."
                )
            order = self.run.rng.child("draw").permutation(len(images))
            chosen, rest = images.subset(order[:wanted]), order[wanted:]
        self.note(images=image_facts(chosen, images))
        return chosen, rest

    def check(self, encoder: Encoder, images: ImageSet) -> None:
        """Warn if the features collapse, ignore their input, or come from another preprocessing."""
        if len(images) >= _CHECK_LEAST:
            pixels = images.take(torch.arange(min(_CHECK_MOST, len(images))))
            for warning in check_encoder(encoder, pixels.float() / 255):
                self.warn(warning)

    def note(self, **facts: Any) -> None:
        """Put fields of the record down as soon as they are known."""
        self.facts.update(facts)

    def warn(self, text: str) -> None:
        """Warn the user now, and the reader of the record later."""
        self.facts.setdefault("warnings", []).append(text)
        _LOG.warning(text)

    def begin(self, **identity: Any) -> None:
        """All inputs are there: note what makes this run the same as another one, for resuming.

        Raises:
            SettingError: the run to resume was another one.
            Stopped: the user asked to stop.
        """
        self.run.check_stop()
        if self.folder is not None:
            source, images = self.facts.get("encoder"), self.facts.get("images")
            same = {
                "job": self._kind.model_fields["job"].default,
                "method": self.facts.get("method"),
                "seed": self.run.rng.seed,
                "settings": self.facts.get("settings"),
                "precision": precision_of(self.run),
                "encoder": None if source is None else source.fingerprint,
                "images": None if images is None else images.digest,
                "image size": None if images is None else f"{images.height} x {images.width}",
            }
            self.folder.begin(same | identity)
            self.note(resumed=bool(self.folder.checkpoints()))

    def perform(self, work: Callable[..., T], *args: Any, part: str | None = None, **kwargs: Any) -> T:
        """``work(*args, run=..., **kwargs)``, timed, on as many devices as were asked for.

        ``part`` names the random streams of the work, if they are not those of the job.

        Raises:
            SettingError: there are not so many devices, or what they need cannot be handed to them.
        """
        with self.timing() as run:
            run = run if part is None else replace(run, rng=run.rng.child(part))
            if self.devices == 1:
                return work(*args, run=run, **kwargs)
            from encoderguard.parallel import spread

            done = spread(work, *args, run=run, devices=self.devices, **kwargs)
            self.note(peak_memory_bytes=done.memory, peak_device_memory_bytes=done.device_memory)
            return done.result

    @contextmanager
    def timing(self) -> Iterator[Run]:
        """Time the method; gives the surroundings to run it in."""
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.run.device)
        began = time.perf_counter()
        try:
            yield self.run
        finally:
            self.note(method_seconds=time.perf_counter() - began)

    def output(self, name: str, write: Callable[[Path], object]) -> None:
        """Have ``write`` fill the file ``name`` when the job finishes."""
        self._outputs[name] = write

    def provenance(self) -> dict[str, Any]:
        """What goes into an encoder's own file."""
        images, source = self.facts.get("images"), self.facts.get("encoder")
        return {
            "job": self._kind.model_fields["job"].default,
            **{key: self.facts.get(key) for key in ("method", "settings")},
            "seed": self.run.rng.seed,
            "images": None if images is None else images.model_dump(mode="json"),
            "source": None if source is None else source.model_dump(mode="json"),
            **source_facts(),
        }

    def finish(self, **facts: Any) -> R:
        """Write all outputs, the record and the report.

        Raises:
            OutputError: a file cannot be written.
            StorageError: the disk is full; nothing half-written remains.
            RunError: the report could not be drawn; the record and the outputs are there.
        """
        self.note(**facts)
        folder = self.folder
        if folder is None:
            return self._record()
        digests = folder.store(self._outputs)
        record = self._record(outputs=digests, report=REPORT, folder=str(folder.path))
        folder.finish(record)
        self._finished = True
        try:
            write_report(folder.path)
        except EncoderGuardError:
            raise
        except Exception as error:
            raise RunError(
                f"The run is finished and recorded in {folder.path}, but its report could not be drawn "
                f"({type(error).__name__}: {error}); try 'encoderguard report {folder.path}'."
            ) from error
        return record

    def _record(self, **facts: Any) -> R:
        command = self.options.get("command")
        values: dict[str, Any] = {
            "created": self._created.isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - self._began,
            "command": None if command is None else list(command),
            **machine_facts(self.run),
            "devices": self.devices,
            **self.facts,
        }
        return self._kind(**(values | facts))


def _require_spreading(method: Method, devices: int) -> None:
    """Before any work: the method must be one that several devices can share."""
    if not method.spreads:
        ready = ", ".join(
            name for name in method_names(method.family) if method_class(method.family, name).spreads
        )
        raise SettingError(
            f"'{method.name}' cannot be shared by {devices} devices; use one device"
            + (f", or one of: {ready}." if ready else ".")
        )
    require_even_shares(getattr(method, "batch_size", devices), devices)
