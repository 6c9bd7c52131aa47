"""Trigger recovery: n sub-generators as one computation against the same n one after another.

All sides take the same steps on the same images. ``one_after_another`` is this package with one
sub-generator, n times; ``straightforward`` is the same without the frozen, folded, low-precision copy of the
encoder: float32, its weights collect gradients.

    python benchmarks/recovery_speed.py --width 8 --generators 4 --batches 4 8 32
"""

import argparse
import json
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from encoderguard import recovery
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet, load_images
from encoderguard.random import Rng
from encoderguard.recovery import RecoveryPlan, recover
from encoderguard.run import Run, resolve_device
from encoderguard.storage import write_text

RESULTS = Path(__file__).parent / "results"


def plainly(encoder: Encoder, sample: Tensor, run: Run) -> tuple[Encoder, bool]:
    """In the place of ``fast_frozen``."""
    return encoder.clone().eval().requires_grad_(True).to(run.device), False


def seconds(
    encoder: Encoder,
    images: ImageSet,
    count: int,
    given: argparse.Namespace,
    batch: int,
    *,
    plain: bool = False,
) -> tuple[float, float]:
    """Wall and CPU seconds of one recovery with ``count`` sub-generators."""
    plan = RecoveryPlan(thresholds=(0.99,) * count, steps=given.steps, batch_size=batch, mix="mask")
    run = Run(rng=Rng(0), device=resolve_device(given.device), precision="float32" if plain else "auto")
    wall, cpu = time.perf_counter(), time.process_time()
    with patch.object(recovery, "fast_frozen", plainly) if plain else nullcontext():
        recover(encoder, images, plan, run=run)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(encoder: Encoder, images: ImageSet, given: argparse.Namespace, batch: int) -> dict[str, Any]:
    """One row: both sides, each the fastest of the repeats."""
    count, found = given.generators, dict[str, dict[str, float]]()
    for name, each, plain in (
        ("together", count, False),
        ("one_after_another", 1, False),
        ("straightforward", 1, True),
    ):
        tries = [
            [seconds(encoder, images, each, given, batch, plain=plain) for _ in range(count // each)]
            for _ in range(given.repeats)
        ]
        wall, cpu = (min(sum(part[k] for part in parts) for parts in tries) for k in (0, 1))
        found[name] = {"wall_s": wall, "cpu_s": cpu}
    row: dict[str, Any] = {"batch": batch, **found}
    for name in ("one_after_another", "straightforward"):
        for clock in ("wall", "cpu"):
            row[f"{clock}_ratio_{name}"] = found[name][f"{clock}_s"] / found["together"][f"{clock}_s"]
    return row


def main() -> None:
    """Measure, print one line per batch size, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="digits:train")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--generators", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_speed.json")
    given = parser.parse_args()
    encoder = Encoder.build(
        EncoderSpec(architecture="encoderguard:resnet18", width=given.width), Rng(0)
    ).eval()
    images = load_images(given.images).sample(256, Rng(0))
    seconds(encoder, images, 1, given, given.batches[0])  # kernels are chosen
    rows = []
    for batch in given.batches:
        rows.append(row := compare(encoder, images, given, batch))
        print(batch, {name: round(row[name], 2) for name in row if "ratio" in name}, flush=True)
    record = {
        "format": "encoderguard.benchmark/1",
        "benchmark": "recovery_speed",
        "images": given.images.rpartition("/")[2],
        "generators": given.generators,
        "width": given.width,
        "steps": given.steps,
        "device": str(resolve_device(given.device)),
        "machine": {
            "processor": platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
