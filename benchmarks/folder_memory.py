"""Peak memory of an image folder: make N tiny files, open them, draw 2,000, stream some batches; print JSON.

    python benchmarks/folder_memory.py 1000000 --out benchmarks/results/folder_memory.json

The files are hard links to a few real ones in a temporary folder, which is removed afterwards.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from encoderguard.images import load_images
from encoderguard.random import Rng

SOURCES = 8  # different pictures
FOLDERS = 1000
LINKS = 50_000  # per source file, below the limit of 65,000 of ext4


def make(root: Path, count: int) -> None:
    draw = torch.randint(
        0, 256, (SOURCES, 32, 32, 3), generator=Rng(0).generator("pixels"), dtype=torch.uint8
    )
    pixels = draw.numpy()
    for number in range(min(count, FOLDERS)):
        (root / f"class{number:04d}").mkdir()
    for number in range(count):
        place = root / f"class{number % FOLDERS:04d}"
        kind = ("png", "jpg")[number % SOURCES % 2]
        source = (
            root / f".source{number % SOURCES}_{number // (SOURCES * LINKS)}.{kind}"
        )  # hidden: not counted
        if not source.exists():
            Image.fromarray(pixels[number % SOURCES]).save(source)
        os.link(source, place / f"image{number:07d}.{kind}")


def peak_mib() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def measure(root: Path, batches: int, size: int) -> dict[str, object]:
    found: dict[str, object] = {"peak_rss_mib_before": peak_mib()}
    start = time.perf_counter()
    images = load_images(str(root), size=size)
    found |= {"images": len(images), "load_seconds": round(time.perf_counter() - start, 2)}
    found["peak_rss_mib_after_load"] = peak_mib()
    start = time.perf_counter()
    drawn = images.sample(2000, Rng(0))
    found["mean_of_sample"] = round(float(drawn.take(range(2000)).float().mean()), 3)
    found |= {"sample_2000_seconds": round(time.perf_counter() - start, 2)}
    found["peak_rss_mib_after_sample"] = peak_mib()
    start = time.perf_counter()
    streamed = sum(len(batch) for batch in islice(images.float_batches(256), batches))
    found |= {"streamed_images": streamed, "stream_seconds": round(time.perf_counter() - start, 2)}
    return found | {"peak_rss_mib_after": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="number of files")
    parser.add_argument("--batches", type=int, default=200, help="batches of 256 to stream")
    parser.add_argument("--size", type=int, default=32, help="image size asked for")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="date to record")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="machine to record")
    parser.add_argument("--out", type=Path, help="also write the record here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, object] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": options.date,
        "machine": options.machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory(prefix="folder_memory") as held:
        start = time.perf_counter()
        make(Path(held), options.count)
        record["make_seconds"] = round(time.perf_counter() - start, 2)
        record |= measure(Path(held), options.batches, options.size)
    text = json.dumps(record, indent=2) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
