"""Two stages: the triggers that the trigger search finds are handed to SSLDefender's unlearning.

    python benchmarks/scan_then_unlearn.py zoo/small --images CIFAR10:train
        --train GTSRB:train --test GTSRB:test --encoders badencoder-t12-s0 badencoder-t12-s1 badencoder-t12-s2

Each suspect is searched beside the zoo's clean encoders without the one it was made from. The encoder's
trigger and target and the labels come in to judge. Rows are kept in the record as they finish; rows that it
already holds are skipped. Five minutes of one core a row, at width 16. ``--handed strongest`` hands over
the strongest trigger alone, without the plain candidate.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.bench.detector_rates import references_of
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet, load_images
from encoderguard.storage import write_text
from encoderguard.zoo import Entry, read_manifest

RESULT = Path(__file__).parent / "results" / "scan_then_unlearn.json"


def judged(encoder: Encoder | str, entry: Entry, given: argparse.Namespace, **more: Any) -> dict[str, float]:
    """ACC and ASR under the attacker's trigger."""
    trigger = given.zoo / f"{entry.name}.trigger.json"
    record = jobs.evaluate(
        encoder, given.train, given.test, trigger=trigger, target=entry.target, probe="linear", **more
    ).record
    names = ("acc", "asr", "clean_acc", "clean_asr")
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def searched(entry: Entry, by_name: dict[str, Entry], given: argparse.Namespace) -> tuple[Any, str]:
    """The scan, and where its triggers lie."""
    references = [
        str(given.zoo / str(by_name[name].bundle)) for name in references_of(entry, by_name.values())
    ]
    out = given.work / entry.name
    done = jobs.scan(
        str(given.zoo / str(entry.bundle)),
        given.images,
        detector="trigger_search",
        references=references,
        count=300,
        seed=given.seed,
        settings={"tune_steps": 0, "remember": str(given.work / "searches")},
        out=out,
        overwrite=True,
    )
    return done.record, str(out if given.handed == "all" else out / "strongest-trigger.json")


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    for name in ("--images", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/scan-then-unlearn"), help="folder of the scans"
    )
    parser.add_argument("--count", type=int, default=2000, help="images that the defense gets")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--handed", choices=["all", "strongest"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.images = load_images(given.images)
    side = given.images.shape[0]
    given.train, given.test = (
        load_images(spec, size=side, labels=True) for spec in (given.train, given.test)
    )
    by_name = {entry.name: entry for entry in read_manifest(given.zoo).cells}
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    for name in given.encoders:
        row: dict[str, Any] = {"encoder": name, "epochs": given.epochs, "seed": given.seed}
        row["handed"] = given.handed
        if any(row.items() <= done.items() for done in record["rows"]):
            continue
        row |= measured(by_name[name], by_name, given)
        told = ("encoder", "handed", "before", "after")
        print(json.dumps({key: row[key] for key in told}), flush=True)
        record["rows"].append(row)
        record |= {"images": given.count, "torch": torch.__version__, "threads": torch.get_num_threads()}
        write_text(RESULT, json.dumps(record, indent=1) + "\n")


def measured(entry: Entry, by_name: dict[str, Entry], given: argparse.Namespace) -> dict[str, Any]:
    """Search, unlearn, judge."""
    suspect, clean = (str(given.zoo / str(by_name[name].bundle)) for name in (entry.name, str(entry.clean)))
    before = judged(suspect, entry, given, clean_encoder=clean)
    begun = time.monotonic()
    found, folder = searched(entry, by_name, given)
    between = time.monotonic()
    images: ImageSet = given.images
    done = jobs.purify(
        suspect,
        images,
        defense="ssl_defender",
        settings={"recovered_trigger": folder, "epochs": given.epochs},
        count=given.count,
        seed=given.seed,
    )
    ended = time.monotonic()
    return {
        "verdict": found.verdict,
        "family": found.evidence["best_family"],
        "before": before,
        "after": judged(done.encoder, entry, given),
        "rounds": done.record.evidence["rounds"],
        "search_seconds": round(between - begun, 1),
        "unlearning_seconds": round(ended - between, 1),
    }


if __name__ == "__main__":
    main()
