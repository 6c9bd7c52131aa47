"""What the trigger search costs: seconds and memory against bank, images, width and image size.

One thing is changed at a time. CPU seconds are the ones to compare on a machine that does other work too.
Peak memory is that of the process so far, so only its growth tells. Other widths are measured on encoders
with random weights, which take as long.

    python benchmarks/trigger_search_cost.py encoder.safetensors --images cifar10:train --image-size 32
"""

import argparse
import json
import platform
import resource
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
_USUAL = 64
"""Images to search with where nothing else is asked."""


def measured(
    encoder: Encoder, images: ImageSet, *, scale: float = 1.0, count: int = _USUAL, seed: int
) -> dict[str, Any]:
    """One search without company and without tuning."""
    wall, cpu = time.monotonic(), time.process_time()
    search = TriggerSearch(scale=scale, images=count, tune_steps=0)
    evidence = search.detect(encoder, images, run=Run(rng=Rng(seed))).evidence
    return {
        "width": encoder.spec.width,
        "side": images.shape[0],
        "scale": scale,
        "images": count,
        "candidates": sum(family["candidates"] for family in evidence["families"].values()),
        "images_passed": evidence["images_passed"],
        "wall_seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "wall_seconds_by_stage": evidence["seconds"],
    }


def main() -> None:
    """Change one thing at a time, and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("encoder", help="spec of an encoder")
    parser.add_argument("--images", default="digits:train", help="spec of clean images")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--sides", type=int, nargs="+", default=[48])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="trigger_search_cost")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    encoder = load_encoder(given.encoder)

    def images(side: int) -> ImageSet:  # half are searched with, half are measured on
        return load_images(given.images, size=side).sample(2 * max(_USUAL, *given.counts), Rng(given.seed))

    usual = images(given.image_size)
    work: list[tuple[Encoder, ImageSet, dict[str, Any]]] = [
        *((encoder, usual, {"scale": scale}) for scale in given.scales),
        (encoder, usual, {}),
        *((encoder, usual, {"count": count}) for count in given.counts),
        *((_other(encoder, width), usual, {}) for width in given.widths),
        *((encoder, images(side), {}) for side in given.sides),
    ]
    rows = []
    for suspect, given_images, settings in work:
        rows.append(measured(suspect, given_images, seed=given.seed, **settings))
        shown = ("width", "side", "scale", "images", "images_passed", "cpu_seconds", "peak_mib_so_far")
        print({key: rows[-1][key] for key in shown}, flush=True)
    record = {
        "encoder": encoder.spec.model_dump(mode="json"),
        "images": given.images,
        "threads": given.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
    }
    write_text(RESULTS / f"{given.name}.json", json.dumps(record, indent=2) + "\n")


def _other(encoder: Encoder, width: int) -> Encoder:
    """Of the same architecture, with random weights."""
    return Encoder.build(encoder.spec.model_copy(update={"width": width}), Rng(0)).eval()


if __name__ == "__main__":
    main()
