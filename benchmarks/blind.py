"""Encoders of fresh seeds, once: is each found out, and is each purified?

    encoderguard zoo build blind --packs PACKS
    python benchmarks/blind.py zoo/blind --references zoo/small --images PACKS/cifar10:train
        --train PACKS/gtsrb:train --test PACKS/gtsrb:test

No setting of a detector or a defense was chosen on these encoders before they were searched (``search``).
Each is scanned by `trigger_search` beside the clean encoders of another zoo, and by DECREE; SSLDefender
purifies the backdoored ones, by its own search (``own``) and from what the scan found (``scan``).
Triggers, targets and labels come in to judge only. The first search of ``blind`` accused clean encoders,
so the rule was changed: ``again`` is the same by the rule of now, no longer blind; ``zoo/fresh`` was
trained after that. Rows are kept as they finish in ``results/ZOO.jsonl``, so several processes may share
the work (``--parts``, ``--encoders``) and a stopped run goes on; ``results/ZOO.json`` sums up. About a
minute of one core a scan and three a purification.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.bench.auroc import auroc
from encoderguard.encoder import Encoder
from encoderguard.images import load_images
from encoderguard.storage import write_text
from encoderguard.zoo import Entry, read_manifest

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def rates(encoder: Encoder | str, entry: Entry, given: argparse.Namespace, **more: Any) -> dict[str, float]:
    """ACC and ASR under the attacker's trigger."""
    trigger = given.zoo / f"{entry.name}.trigger.json"
    record = jobs.evaluate(
        encoder, given.train, given.test, trigger=trigger, target=entry.target, probe="linear", **more
    ).record
    names = ("acc", "asr", "clean_acc", "clean_asr")
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def bundle(entry: Entry, given: argparse.Namespace) -> str:
    """The encoder's file."""
    return str(given.zoo / str(entry.bundle))


def searched(entry: Entry, given: argparse.Namespace) -> Row:
    """The trigger search's verdict; its triggers stay in the folder of the scans."""
    record = jobs.scan(
        bundle(entry, given),
        given.images,
        detector="trigger_search",
        references=[str(given.references)],
        count=300,
        settings={"tune_steps": 0, "remember": str(given.work / "searches")},
        out=given.work / entry.name,
        overwrite=True,
    ).record
    told = {name: record.evidence[name] for name in ("reason", "unlike", "best_family", "null_size")}
    return verdict_of(record) | told


def decree(entry: Entry, given: argparse.Namespace) -> Row:
    """DECREE's verdict."""
    return verdict_of(jobs.scan(bundle(entry, given), given.images, detector="decree", count=300).record)


def verdict_of(record: Any) -> Row:
    """What a scan said."""
    names = ("verdict", "score", "p_value", "method_seconds")
    return {name: getattr(record, name) for name in names}


def before(entry: Entry, given: argparse.Namespace) -> Row:
    """Undefended, beside the clean encoder."""
    clean = next(cell for cell in read_manifest(given.zoo).cells if cell.name == entry.clean)
    return rates(bundle(entry, given), entry, given, clean_encoder=bundle(clean, given))


def purified(entry: Entry, given: argparse.Namespace, **settings: str) -> Row:
    """After SSLDefender."""
    done = jobs.purify(
        bundle(entry, given), given.images, defense="ssl_defender", settings=settings, count=given.count
    )
    rounds: Any = done.record.evidence["rounds"]
    excess = [part["excess"] for part in rounds]
    seconds = done.record.method_seconds
    return rates(done.encoder, entry, given) | {"method_seconds": seconds, "excess": excess}


def after_scan(entry: Entry, given: argparse.Namespace) -> Row:
    """After SSLDefender with the scan's triggers."""
    return purified(entry, given, recovered_trigger=str(given.work / entry.name))


PARTS: dict[str, Callable[[Entry, argparse.Namespace], Row]] = {
    "search": searched,
    "again": searched,
    "decree": decree,
    "none": before,
    "scan": after_scan,
    "own": purified,
}
OF_ATTACKED = ("none", "scan", "own")


def known(lines: Path) -> list[Row]:
    """The rows so far."""
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def summary(given: argparse.Namespace) -> Row:
    """Who was found, who was accused, what was left."""
    rows = {(row["encoder"], row["part"]): row for row in known(given.lines)}
    cells = [cell for cell in read_manifest(given.zoo).cells if cell.status == "built"]
    record: Row = {"zoo": str(given.zoo), "references": str(given.references), "detectors": {}}
    for part in ("search", "again", "decree"):
        told = [(cell, rows[cell.name, part]) for cell in cells if (cell.name, part) in rows]
        for kind, some in (
            ("clean", [row for cell, row in told if cell.attack is None]),
            ("backdoored, ASR 80 % or more", [row for cell, row in told if (cell.asr or 0) >= 0.8]),
        ):
            counts = dict(Counter(str(row["verdict"]) for row in some))
            record["detectors"].setdefault(part, {})[kind] = counts
        sign = -1 if part == "decree" else 1  # a small score is suspicious to DECREE
        low = [sign * row["score"] for cell, row in told if cell.attack is None]
        high = [sign * row["score"] for cell, row in told if (cell.asr or 0) >= 0.8]
        if low and high:
            record["detectors"][part]["auroc"] = auroc(low, high)
    keys = (
        "name",
        "attack",
        "target",
        "seed",
        "acc",
        "asr",
        "clean",
        "clean_acc",
        "clean_asr",
        "fingerprint",
    )
    record["encoders"] = [{key: getattr(cell, key) for key in keys} for cell in cells]
    return record | {"rows": list(rows.values()), "torch": torch.__version__}


def main() -> None:
    """Run the rows that are missing, and sum up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--references", type=Path, required=True, help="folder of another zoo")
    for name in ("--images", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["search", "decree"])
    parser.add_argument("--encoders", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("runs/blind"), help="folder of the scans")
    parser.add_argument("--count", type=int, default=2000, help="images that the defense gets")
    given = parser.parse_args()
    given.lines = RESULTS / f"{given.zoo.name}.jsonl"
    given.images = load_images(given.images)
    given.train, given.test = (
        load_images(spec, size=given.images.shape[0], labels=True) for spec in (given.train, given.test)
    )
    cells = [cell for cell in read_manifest(given.zoo).cells if cell.status == "built"]
    for part in given.parts:
        for cell in cells:
            chosen = given.encoders is None or cell.name in given.encoders
            there = any((row["encoder"], row["part"]) == (cell.name, part) for row in known(given.lines))
            if not chosen or there or (part in OF_ATTACKED and cell.attack is None):
                continue
            row = {"encoder": cell.name, "part": part} | PARTS[part](cell, given)
            print({key: value for key, value in row.items() if key != "reason"}, flush=True)
            with given.lines.open("a") as file:
                file.write(json.dumps(row) + "\n")
    write_text(given.lines.with_suffix(".json"), json.dumps(summary(given), indent=1) + "\n")


if __name__ == "__main__":
    main()
