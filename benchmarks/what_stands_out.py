"""What the search of SSLDefender measures on encoders of zoos: collapse by family, interaction of patches.

Medians of collapse over the clean encoders of the first zoo are what counts as typical (``TYPICAL`` of
``encoderguard.search``, which were taken from another draw of images); the record holds them too.

    encoderguard zoo build fresh --packs PACKS
    encoderguard zoo build blind --packs PACKS
    python benchmarks/what_stands_out.py zoo/small zoo/fresh zoo/blind zoo/others zoo/unseen \\
        --images CIFAR10:train

Rows are kept as they finish; rows that the record already holds are skipped. Twenty core seconds a row.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from encoderguard.images import ImageSet, load_images
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.rays import FAMILIES
from encoderguard.run import Run
from encoderguard.search import TYPICAL, interaction, quick_search
from encoderguard.storage import write_text
from encoderguard.zoo import Entry, read_manifest

RESULT = Path(__file__).parent / "results" / "what_stands_out.json"


def measured(entry: Entry, zoo: Path, images: ImageSet, seed: int) -> dict[str, Any]:
    """One search; its statistic of collapse by family, the largest interaction and its patch."""
    found = quick_search(load_encoder(str(zoo / str(entry.bundle))), images, run=Run(rng=Rng(seed)))
    value, ray = interaction(found["patch"])
    return {
        "encoder": f"{zoo.name}/{entry.name}",
        "attack": entry.attack,
        "asr": entry.asr,
        "clean_asr": entry.clean_asr,
        "collapse": {family: round(result.statistic, 3) for family, result in found.items()},
        "interaction": round(value, 3),
        "patch": None if ray is None else f"{ray.label} to {ray.place}",
    }


def summary(rows: list[dict[str, Any]], zoo: str) -> dict[str, Any]:
    """What is typical of the zoo's clean encoders, beside what the code holds."""
    clean = [row for row in rows if row["attack"] is None and row["encoder"].startswith(f"{zoo}/")]
    typical = {family: round(median(row["collapse"][family] for row in clean), 2) for family in FAMILIES}
    every = [row["interaction"] for row in rows if row["attack"] is None]
    return {"typical": typical, "in_the_code": TYPICAL, "largest_clean_interaction": max(every)}


def main() -> None:
    """Measure the encoders that the record lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoos", type=Path, nargs="+")
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    images = load_images(given.images)
    order = Rng(given.seed).permutation(len(images), "draw")
    images = images.subset(order[: given.count])
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    held = {row["encoder"] for row in record["rows"]}
    for zoo in given.zoos:
        for entry in read_manifest(zoo).cells:
            if entry.bundle is None or f"{zoo.name}/{entry.name}" in held:
                continue
            row = measured(entry, zoo, images, given.seed)
            print(row, flush=True)
            record["rows"].append(row)
            record |= summary(record["rows"], given.zoos[0].name)
            write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
