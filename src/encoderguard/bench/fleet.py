"""Scans many encoders with the benchmark's engine: nothing twice, lost workers survive, resumable."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoderguard.bench.cells import Places, open_images
from encoderguard.bench.engine import run_cells
from encoderguard.bench.notation import Sheet, as_csv, as_markdown
from encoderguard.bench.outcome import seconds_of
from encoderguard.bench.plan import Cell
from encoderguard.bench.run import EngineName, backend
from encoderguard.bench.store import Store, file_digest
from encoderguard.errors import SettingError
from encoderguard.loading import paths_in
from encoderguard.registry import create
from encoderguard.run import Progress, StopSignal
from encoderguard.storage import write_text

__all__ = ["exit_code", "read_specs", "scan_fleet"]


def read_specs(path: Path) -> list[str]:
    """Encoder specs, one a line; empty lines and those that begin with ``#`` are left out.

    Raises:
        SettingError: the file cannot be read, holds none, or holds one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The list of encoders {path} cannot be read ({type(error).__name__}).") from None
    specs = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not specs:
        raise SettingError(f"{path} names no encoder; write one spec per line.")
    if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise SettingError(f"{path} names '{twice}' twice; name each encoder once.")
    return specs


def scan_fleet(
    specs: list[str],
    images: str,
    *,
    detector: str,
    settings: Mapping[str, Any] | None = None,
    count: int = 1000,
    seed: int = 0,
    image_size: int | None = None,
    out: Path,
    places: Places | None = None,
    engine: EngineName = "local",
    workers: int | None = None,
    accelerators: float | None = None,
    progress: Progress = lambda task, done, total, note="": None,
    stop: StopSignal | None = None,
) -> list[dict[str, Any]]:
    """Scan each encoder; write ``fleet.json``, ``fleet.csv`` and ``fleet.md`` into ``out``.

    Args:
        specs: encoder specs, as ``scan`` takes them.
        images: spec of the clean unlabelled images, the same for all.
        detector: name of a detector.
        settings: of the detector.
        count: images to draw with the seed.
        seed: of the draw and of the detector.
        image_size: side in pixels to which images are brought.
        out: folder of the results and of the finished scans.
        places: where data are, which device.
        engine: worker processes here, or Ray.
        workers: scans at the same time; all cores, or what the Ray cluster has room for, by default.
        accelerators: share of one for each scan, with Ray; a whole one by default where there are any.
        progress: shown as scans finish.
        stop: set it to stop; finished scans are kept.

    Returns:
        One entry per encoder: spec, verdict (null if the scan failed), score, threshold, seconds, error.

    Raises:
        UsageError: an argument cannot be used as given.
        Stopped: the user asked to stop.
    """
    where, store = places or Places(), Store(out / "store")
    make = backend(engine, store, where, workers=workers, accelerators=accelerators)
    used = create("detector", detector, settings).settings()
    digests = {"images": open_images(images, where).digest}
    digests |= {f"setting {name}": _identity(value) for name, value in used.items() if _names_files(value)}
    extra = {"count": count, "image_size": image_size}
    scan = Cell(job="scan", method=detector, settings=used, seed=seed, digests=digests, extra=extra)
    cells = [_of(spec, images, scan) for spec in specs]
    outcome = run_cells(cells, store, make, progress=progress, stop=stop or StopSignal())
    found = [_entry(cell, store, outcome.failed.get(cell)) for cell in cells]
    _write(found, out)
    return found


def _of(spec: str, images: str, scan: Cell) -> Cell:
    """The scan of one encoder."""
    digests = scan.digests | {"encoder": _identity(spec)}
    return replace(scan, data={"encoder": spec, "images": images}, digests=digests)


def _entry(cell: Cell, store: Store, error: str | None) -> dict[str, Any]:
    record = {} if error else store.facts(cell)["record"]
    return {
        "spec": cell.data["encoder"],
        **{name: record.get(name) for name in ("verdict", "score", "threshold", "p_value")},
        "seconds": seconds_of(record),
        "error": error,
        "run": str(store.folder(cell)),
    }


def exit_code(found: list[dict[str, Any]]) -> int:
    """1 if any encoder is called backdoored, else 2 if a scan failed, else 3 if any is inconclusive."""
    verdicts = {entry["verdict"] for entry in found}
    return (
        1 if "backdoored" in verdicts else 2 if None in verdicts else 3 if "inconclusive" in verdicts else 0
    )


def _identity(given: Any) -> str:
    """Of everything that is named, with the content of the files: hubs do not change what a name means."""
    texts = [given] if isinstance(given, str) else list(given)
    contents = [[text, *map(file_digest, _files(text))] for text in texts]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _names_files(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    return any(isinstance(text, str) and _files(text) for text in texts)


def _files(spec: str) -> list[Path]:
    """The file behind any prefix such as ``timm:NAME@``; of the folder of a zoo its manifest."""
    return [file for path in paths_in(spec) for file in (path, path / "manifest.json") if file.is_file()]


def _write(found: list[dict[str, Any]], out: Path) -> None:
    rows = [
        [
            entry["spec"],
            entry["verdict"] or "failed",
            "-" if entry["score"] is None else f"{entry['score']:.4f}",
            "-" if entry["threshold"] is None else f"{entry['threshold']:.4f}",
            "-" if entry["seconds"] is None else f"{entry['seconds']:.1f}",
            entry["error"] or "",
        ]
        for entry in found
    ]
    header = ["encoder", "verdict", "score", "threshold", "seconds", "error"]
    sheet = Sheet(title="Scans", header=header, rows=rows)
    write_text(out / "fleet.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_text(out / "fleet.csv", as_csv(sheet))
    write_text(out / "fleet.md", as_markdown(sheet))
