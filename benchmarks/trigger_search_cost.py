"""What the trigger search costs: seconds of each stage against the size of the bank and the number of images.

CPU seconds are the ones to compare on a machine that does other work too.

    python benchmarks/trigger_search_cost.py encoder.safetensors --images cifar10:train --image-size 32
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from encoderguard.detectors.trigger_search import TriggerSearch
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet, load_images
from encoderguard.loading import load_encoder
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.storage import write_text

RESULTS = Path(__file__).parent / "results"


def measured(encoder: Encoder, images: ImageSet, *, scale: float, count: int, seed: int) -> dict[str, Any]:
    """One search without company and without tuning."""
    wall, cpu = time.monotonic(), time.process_time()
    search = TriggerSearch(scale=scale, images=count, tune_steps=0)
    evidence = search.detect(encoder, images, run=Run(rng=Rng(seed))).evidence
    return {
        "scale": scale,
        "images": count,
        "seed": seed,
        "candidates": sum(family["candidates"] for family in evidence["families"].values()),
        "images_passed": evidence["images_passed"],
        "wall_seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds_by_stage": evidence["seconds"],
        "statistics": {name: family["statistic"] for name, family in evidence["families"].items()},
    }


def main() -> None:
    """Measure every scale with every number of images, and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("encoder", help="spec of an encoder")
    parser.add_argument("--images", default="digits:train", help="spec of clean images")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="trigger_search_cost")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    encoder = load_encoder(given.encoder)
    images = load_images(given.images, size=given.image_size).sample(2 * max(given.counts), Rng(given.seed))
    rows = []
    for scale, count in itertools.product(given.scales, given.counts):
        rows.append(measured(encoder, images, scale=scale, count=count, seed=given.seed))
        print({key: rows[-1][key] for key in ("scale", "images", "images_passed", "cpu_seconds")}, flush=True)
    record = {
        "encoder": encoder.spec.model_dump(mode="json"),
        "images": given.images,
        "threads": given.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    write_text(RESULTS / f"{given.name}.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
