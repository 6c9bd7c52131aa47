"""DECREE's Table 1 in small: Neural Cleanse and ABS on classifiers on clean and backdoored encoders.

    python benchmarks/downstream_scanners.py zoo/small --train GTSRB:train --test GTSRB:test \
        --encoders simclr-s0 simclr-s1 badencoder-t12-s0 badencoder-t12-s1

A linear classifier of the task's ten most frequent classes, the attacker's target among them, is fitted on
each encoder's features; both detectors get it as ``classifier_file``, with unlabelled images of the task.
Rows are kept in the record as they finish; those that it holds are skipped. Seven minutes of a core a row.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet, load_images
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.run import Run
from encoderguard.storage import write_text
from encoderguard.zoo import Entry, read_manifest

RESULT = Path(__file__).parent / "results" / "downstream_scanners.json"
CLASSES = 10


def labels_of(images: ImageSet) -> Tensor:
    """int64 ``[N]``."""
    return torch.as_tensor(images.labels)


def narrowed(images: ImageSet, classes: list[int]) -> tuple[ImageSet, Tensor]:
    """The images of these classes, and the place of each one's class in the list."""
    held = [place for place, label in enumerate(labels_of(images).tolist()) if label in classes]
    kept = images.subset(torch.tensor(held))
    return kept, torch.tensor([classes.index(label) for label in labels_of(kept).tolist()])


def fitted(encoder: Encoder, images: ImageSet, labels: Tensor, run: Run) -> dict[str, Tensor]:
    """Weight and bias of logistic regression on standardised features, folded for features as they are."""
    features = extract(encoder, images, run=run).double()
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    deviation = deviation.clamp_min(1e-9)
    model = LogisticRegression(max_iter=1000).fit((features - mean) / deviation, labels)
    weight = torch.from_numpy(model.coef_) / deviation
    return {"weight": weight.float(), "bias": (torch.from_numpy(model.intercept_) - weight @ mean).float()}


def measured(entry: Entry, given: argparse.Namespace) -> dict[str, Any]:
    """One encoder: its classifier's accuracy, and what each detector says."""
    run = Run(rng=Rng(given.seed))
    encoder = load_encoder(str(given.zoo / str(entry.bundle)))
    classes: list[int] = labels_of(given.train).bincount().argsort(descending=True)[:CLASSES].tolist()
    (train, labels), (test, truth) = narrowed(given.train, classes), narrowed(given.test, classes)
    row: dict[str, Any] = {"encoder": entry.name, "attack": entry.attack, "classes": classes}
    row |= {"target": entry.target, "zoo_asr": entry.asr, "seed": given.seed}
    some = run.rng.child("draw").permutation(len(train))
    clean = train.subset(some[: given.count])
    with tempfile.TemporaryDirectory() as folder:
        head = fitted(encoder, train, labels, run)
        scores = extract(encoder, test, run=run) @ head["weight"].T + head["bias"]
        row["accuracy"] = round(float((scores.argmax(1) == truth).double().mean()), 4)
        path = Path(folder) / "head.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, path)
        for name in ("neural_cleanse", "abs"):
            began, cpu = time.monotonic(), time.process_time()
            found = create("detector", name, {"classifier_file": str(path)}).detect(encoder, clean, run=run)
            row[name] = {
                "score": round(found.score, 4),
                "threshold": found.threshold,
                "above": found.score > found.threshold,
                "verdict": found.verdict,
                "answer": classes[found.evidence.get("answer", found.evidence.get("cluster"))],
                "reason": found.evidence["reason"],
                "seconds": round(time.monotonic() - began, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
    return row


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    for name in ("--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=1000, help="images that the detectors get")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.train, given.test = (load_images(spec, size=32, labels=True) for spec in (given.train, given.test))
    by_name = {entry.name: entry for entry in read_manifest(given.zoo).cells}
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    for name in given.encoders:
        if any(row["encoder"] == name and row["seed"] == given.seed for row in record["rows"]):
            continue
        row = measured(by_name[name], given)
        print(json.dumps(row), flush=True)
        record["rows"].append(row)
        write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
