"""What decides whether a distilled student loses the backdoor: MIMIC's Figure 6 and more.

Command (CIFAR-10 encoder of the ``cifar10`` recipe, two cores, about 4 minutes a row on one core):
    python benchmarks/mimic_ablation.py --story runs/cifar10-gtsrb/seed-0
        --clean runs/cifar10-clean/encoder.safetensors
        --images CIFAR10:train --train GTSRB:train --test GTSRB:test --target 12 --epochs 50 --rows 0 1 2

Rows are kept in the record as they finish; rows that it already holds are skipped.
The defense sees 2,000 unlabelled training images; trigger, target and labels only come in to judge.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet, load_images
from encoderguard.storage import write_text

ROWS: list[dict[str, Any]] = [
    {},
    {"patches": 0.0, "lambda2": 1.0},
    {"patches": 0.0, "lambda2": 1.0, "weighting": "uniform"},
    {"patches": 0.0, "lambda2": 0.0},
    {"patches": 0.0, "lambda2": 1.0, "lambda1": 0.0},
    {"patches": 0.0, "lambda2": 0.0, "lambda1": 0.0},
    {"patches": 0.0, "lambda2": 1.0, "lambda1": 0.3},
    {"patches": 0.0, "lambda2": 3.0},
    {"patches": 0.0, "lambda2": 3.0, "lambda1": 2.0},
    {"patches": 0.5, "lambda2": 1.0},
    {"patches": 0.0, "lambda2": 1.0, "weighting": "zscore", "alpha0": 1.0, "alpha1": 1.0},
]


def judged(
    encoder: Encoder | str, train: ImageSet, test: ImageSet, given: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """ACC and ASR under the attacker's trigger."""
    record = jobs.evaluate(
        encoder,
        train,
        test,
        trigger=given.story / "backdoored/trigger.json",
        target=given.target,
        probe=given.probe,
        **more,
    ).record
    names = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "clean_asr_all")
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--story", type=Path, required=True, help="a seed's folder of the main job")
    parser.add_argument("--clean", required=True)
    for name in ("--images", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--probe", default="linear")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    images = load_images(given.images)
    train, test = (load_images(spec, size=images.shape[0], labels=True) for spec in (given.train, given.test))
    suspect = str(given.story / "backdoored/encoder.safetensors")
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    if "undefended" not in record:
        record["undefended"] = judged(suspect, train, test, given, clean_encoder=given.clean)
    for number in given.rows:
        settings = {"epochs": given.epochs, **ROWS[number]}
        key = {"settings": settings, "seed": given.seed}
        if any({name: row[name] for name in key} == key for row in record["rows"]):
            continue
        began = time.perf_counter()
        done = jobs.purify(suspect, images, settings=settings, count=2000, seed=given.seed)
        row = {
            **key,
            "seconds": round(time.perf_counter() - began, 1),
            **judged(done.encoder, train, test, given),
            "fidelity": done.record.fidelity,
            "beta": done.purified.evidence["beta"],
            "loss": {name: curve[-1] for name, curve in done.purified.history.items()},
        }
        record["rows"].append(row)
        record |= {"target": given.target, "probe": given.probe, "torch": torch.__version__}
        write_text(given.out, json.dumps(record, indent=2) + "\n")
        print(settings, {name: round(row[name], 4) for name in ("acc", "asr", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
