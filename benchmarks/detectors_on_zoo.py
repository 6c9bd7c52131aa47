"""Run detectors over a zoo and measure how well they tell its backdoored encoders from its clean ones.

    python benchmarks/detectors_on_zoo.py zoo/small --images ../shared/data/cifar10:train
    python benchmarks/detectors_on_zoo.py zoo/small --images ../shared/data/cifar10:train \
        --detectors students --encoders simclr-s1,badencoder-t12-s0

Every (encoder, detector) is one JSON line in ``results/detectors_ZOO.jsonl``, written as soon as it is done:
a run that was stopped goes on where it was. The summary is ``results/detectors_ZOO.json``; ``--summary``
makes it from the lines alone. Cost with width 16 on one core: about a minute per encoder and detector.

The trigger search is run once per encoder without references, and judged afterwards beside the same search
on clean encoders, as if they were its ``references``: see ``encoderguard.bench.detector_rates``. ``students``
is the same search beside two students distilled from the suspect, as for a user who has no reference.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from encoderguard.bench.detector_rates import summary
from encoderguard.collapse import Collapse
from encoderguard.errors import RunError, UsageError
from encoderguard.images import ImageSet, load_images
from encoderguard.loading import load_encoder
from encoderguard.methods import Detection, Detector
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.run import Run
from encoderguard.storage import write_text
from encoderguard.triggers import load_trigger
from encoderguard.zoo import Entry, read_manifest

RESULTS = Path(__file__).parent / "results"
DETECTORS = "trigger_search,decree,neural_cleanse,abs,ssl_cleanse"
SETTINGS: dict[str, dict[str, Any]] = {"trigger_search": {"tune_steps": 0}}
"""What differs from the defaults: tuning a copy decides nothing and takes time."""
STUDENTS = "students"
JUDGING = ("fpr", "margin", "prior_spread", "moved_spread")
"""Settings of the trigger search that change what is made of a search, not the search."""


def detector_named(name: str) -> Detector:
    """By its registered name; ``students`` is the trigger search beside two of them."""
    if name == STUDENTS:
        name, given = "trigger_search", SETTINGS["trigger_search"] | {"students": 2}
    else:
        given = SETTINGS.get(name, {})
    return cast(Detector, create("detector", name, given))


def label_of(detector: Detector) -> str:
    """Under which its rows stand."""
    students = detector.settings().get("students", 0)
    return f"{detector.name}, {students} students" if students else detector.name


def key_of(entry: Entry, detector: Detector, images: ImageSet, seed: int) -> str:
    """What a result depends on."""
    searching = {name: value for name, value in detector.settings().items() if name not in JUDGING}
    told = searching if detector.name == "trigger_search" else detector.settings()
    facts = [entry.fingerprint, detector.name, told, images.digest, seed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The finished rows by key; a line that a killed run left unfinished is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def measured(entry: Entry, folder: Path, detector: Detector, images: ImageSet, seed: int) -> dict[str, Any]:
    """One detector on one encoder, which it gets with clean images and nothing else."""
    row: dict[str, Any] = {
        "key": key_of(entry, detector, images, seed),
        "encoder": entry.name,
        "detector": label_of(detector),
        "settings": detector.settings(),
        "images": {"name": images.name, "count": len(images), "digest": images.digest},
        "seed": seed,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    encoder = load_encoder(str(folder / cast(str, entry.bundle)))
    wall, cpu = time.monotonic(), time.process_time()
    try:
        found = detector.detect(encoder, images, run=Run(rng=Rng(seed)))
    except (RunError, UsageError) as error:
        return row | {"error": str(error)}
    return row | {
        "verdict": found.verdict,
        "score": found.score,
        "threshold": found.threshold,
        "wall_seconds": round(time.monotonic() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        **_evidence(found),
    }


def _evidence(found: Detection) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: found.evidence[name] for name in ("reason", "images_passed") if name in found.evidence
    }
    if "channels" in found.evidence:  # of ABS: how many images its share is of
        kept["moved_of"] = found.evidence.get("images_of_other_clusters")
    if families := found.evidence.get("families"):
        shown = ("statistic", "collapse", "bank", "displacements", "bank_best", "bank_label")
        kept["families"] = {
            family: {name: value[name] for name in shown} for family, value in families.items()
        }
        kept["seconds_by_stage"] = {k: round(v, 2) for k, v in found.evidence["seconds"].items()}
    return kept


def missing(
    folder: Path,
    detectors: list[Detector],
    images: ImageSet,
    seed: int,
    known: dict[str, dict[str, Any]],
    only: set[str],
) -> Iterator[dict[str, Any]]:
    """Measure what has no row yet, all detectors on one encoder after another, clean ones first."""
    built = [entry for entry in read_manifest(folder).cells if entry.status == "built"]
    built = [entry for entry in built if not only or entry.name in only]
    for entry in sorted(built, key=lambda entry: entry.attack is not None):
        for detector in detectors:
            row = known.get(key_of(entry, detector, images, seed))
            if row is None or "error" in row:
                yield measured(entry, folder, detector, images, seed)


def own_triggers(folder: Path, images: ImageSet) -> list[dict[str, Any]]:
    """What the planted trigger does, which no detector sees, on the encoder and on the clean one.

    It parts two reasons to miss: the search did not find the trigger, or the trigger does little.
    """
    told = []
    manifest, run = read_manifest(folder), Run(rng=Rng(0))
    for entry in manifest.cells:
        origin = manifest.entry(entry.clean or "")
        if entry.status != "built" or not entry.trigger_file or origin is None:
            continue
        trigger = load_trigger(folder / entry.trigger_file)
        own, before = (
            Collapse(load_encoder(str(folder / cast(str, each.bundle))), images, run=run, exact=True)
            for each in (entry, origin)
        )
        row = {"encoder": entry.name, "attack": entry.attack, "asr": entry.asr}
        told.append(
            row | own.measure([trigger])[0]._asdict() | {"on_clean": before.measure([trigger])[0]._asdict()}
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("zoo", type=Path, help="folder with a manifest.json")
    parser.add_argument("--images", required=True, help="spec of clean images")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=300, help="images that a detector gets")
    parser.add_argument("--detectors", default=DETECTORS)
    parser.add_argument("--encoders", help="measure these alone, names with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    detectors = [detector_named(name) for name in given.detectors.split(",")]
    only = set(given.encoders.split(",")) if given.encoders else set()
    images = load_images(given.images, size=given.image_size).sample(given.count, Rng(given.seed))
    lines = given.out / f"detectors_{given.zoo.name}.jsonl"
    known = read_lines(lines)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.summary:
        with lines.open("a", encoding="utf-8") as stream:
            for row in missing(given.zoo, detectors, images, given.seed, known, only):
                stream.write(json.dumps(row, allow_nan=False) + "\n")
                stream.flush()
                known[row["key"]] = row
                print(row["encoder"], row["detector"], row.get("verdict", row.get("error")), flush=True)
    manifest = read_manifest(given.zoo)
    keys = {
        key_of(entry, detector, images, given.seed)
        for entry in manifest.cells
        if entry.status == "built"
        for detector in detectors
    }
    rows = [row for key, row in known.items() if key in keys]
    record = {
        "zoo": {"name": manifest.name, "digest": manifest.digest},
        "command": f"python benchmarks/detectors_on_zoo.py {given.zoo} --images {given.images} "
        f"--count {given.count} --seed {given.seed} --detectors {given.detectors}",
        "images": {"name": images.name, "count": len(images), "digest": images.digest},
        "settings": {label_of(detector): detector.settings() for detector in detectors},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
        **summary(rows, manifest.cells),
        "own_triggers": own_triggers(given.zoo, images.subset(range(min(100, len(images))))),
    }
    write_text(given.out / f"detectors_{given.zoo.name}.json", json.dumps(record, indent=1) + "\n")
    for block in record["blocks"]:
        for name, rates in block["detectors"].items():
            print(block["name"], name, {k: rates[k] for k in ("auroc", "verdicts")}, flush=True)


if __name__ == "__main__":
    main()
