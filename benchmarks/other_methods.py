"""What the detectors say of clean encoders that were trained by another method than their references.

    python benchmarks/other_methods.py zoo/others zoo/unseen --references zoo/small --images CIFAR10:train

Each clean encoder of the first zoos is scanned beside all clean ones of the last, beside those of one
training alone, and by DECREE. A minute or two per encoder on one core; references are searched once.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.bench.detector_rates import training_of
from encoderguard.storage import write_text
from encoderguard.zoo import Entry, read_manifest

KEPT = ("reason", "unlike", "null_size")


def scanned(entry: Entry, folder: Path, given: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """One scan, as ``encoderguard scan`` does it."""
    record = jobs.scan(str(folder / str(entry.bundle)), given.images, count=given.count, **settings).record
    told = {name: record.evidence[name] for name in KEPT if name in record.evidence}
    row = {
        "encoder": entry.name,
        "zoo": folder.name,
        "detector": record.detector,
        "references": settings.get("references", []),
    }
    values: dict[str, Any] = {name: getattr(record, name) for name in ("verdict", "score", "p_value")}
    return row | values | told | {"seconds": record.seconds}


def main() -> None:
    """Scan them all and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoos", type=Path, nargs="+")
    parser.add_argument("--references", type=Path, required=True, help="folder of a zoo")
    parser.add_argument("--images", required=True, help="spec of clean images")
    parser.add_argument("--count", type=int, default=300)
    given = parser.parse_args()
    clean = [e for e in read_manifest(given.references).cells if e.attack is None and e.status == "built"]
    common = Counter(map(training_of, clean)).most_common(1)[0][0]
    alike = [str(given.references / str(e.bundle)) for e in clean if training_of(e) == common]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as remembered:
        more: Any = {"tune_steps": 0, "remember": remembered}
        for folder, entry in ((zoo, entry) for zoo in given.zoos for entry in read_manifest(zoo).cells):
            for references in ([str(given.references)], alike):
                rows.append(scanned(entry, folder, given, references=references, settings=more))
            rows.append(scanned(entry, folder, given, detector="decree"))
            for row in rows[-3:]:
                print({key: row[key] for key in ("encoder", "detector", "verdict", "p_value")}, flush=True)
    record = {
        "command": f"python benchmarks/other_methods.py {' '.join(map(str, given.zoos))} "
        f"--references {given.references} --images {given.images} --count {given.count}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "other_methods.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
