"""Images per second of each pre-training method, against the bare network in the same run.

Bare is what no implementation can avoid: the method's passes of the encoder at the same batch and precision,
on views that are ready, and an optimiser step. SimCLR and SimSiam pass two views forward and backward, BYOL
two more forward without a gradient, MoCo one and one, supervised and CLIP one. A method's time is that of its
steps in the training loop: views, heads, loss and momentum included.

Command: python benchmarks/pretrain_speed.py
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet
from encoderguard.methods import Pretraining
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.run import Run

PASSES = {
    "simclr": (2, 0),
    "moco": (1, 1),
    "byol": (2, 2),
    "simsiam": (2, 0),
    "supervised": (1, 0),
    "clip": (1, 0),
}
"""Views that the encoder sees per image: forward and backward, forward alone."""


def encoder(width: int) -> Encoder:
    """ResNet-18 for 32 px."""
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=width), Rng(0))


def pictures(count: int, side: int) -> ImageSet:
    """Noise with labels."""
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, torch.arange(count) % 10, name="noise")


def wait(device: torch.device) -> None:
    """Let the device finish, so that a clock measures work and not its start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def method_times(name: str, width: int, batch: int, steps: int, images: ImageSet, run: Run) -> list[float]:
    """Seconds of each step of the training loop but the first two."""
    ticks: list[float] = []

    def tick(task: str, done: int, total: int, note: str = "") -> None:
        wait(run.device)
        ticks.append(time.perf_counter())

    method: Pretraining = create("pretrain", name, {"epochs": 1, "batch_size": batch})
    part = images.subset(range(batch * (steps + 2)))
    method.train(encoder(width), part, run=replace(run, progress=tick))
    return [after - before for before, after in pairwise(ticks[1:])]


def bare_step(name: str, width: int, batch: int, side: int, run: Run) -> Callable[[], object]:
    """The encoder's passes of one step and the optimiser's."""
    student = encoder(width).to(run.device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, fused=True)
    both, forward = PASSES[name]
    views = torch.rand(both * batch, 3, side, side, generator=Rng(2).generator()).to(run.device)
    others = torch.rand(forward * batch, 3, side, side, generator=Rng(3).generator()).to(run.device)
    # views that a method passes one by one are passed one by one here
    parts = [views] if name == "simclr" else list(torch.split(views, batch))

    def step() -> None:
        with run.autocast():
            with torch.no_grad():
                for part in torch.split(others, batch) if forward else ():
                    student(part)
            loss = torch.stack([student(part).square().mean() for part in parts]).sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        wait(run.device)

    return step


def seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Time of each call but the first."""
    step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def measure(
    name: str, width: int, batch: int, side: int, steps: int, rounds: int, images: ImageSet, run: Run
) -> dict[str, Any]:
    """One row: method and bare network in turn, so that a busy moment falls on both."""
    bare = bare_step(name, width, batch, side, run)
    ours, theirs = list[float](), list[float]()
    for _ in range(rounds):
        theirs += seconds(bare, steps)
        ours += method_times(name, width, batch, steps, images, run)
    return {
        "method": name,
        "step_seconds": median(ours),
        "bare_step_seconds": median(theirs),
        "fastest_step_seconds": min(ours),
        "fastest_bare_step_seconds": min(theirs),
        "images_per_second": batch / median(ours),
        "bare_images_per_second": batch / median(theirs),
        "ratio": median(theirs) / median(ours),
        "ratio_of_fastest": min(theirs) / min(ours),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(PASSES))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretrain_speed.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    run = Run(rng=Rng(0), device=torch.device(given.device))
    images = pictures(given.batch * (given.steps + 2), given.side)
    shape = (given.width, given.batch, given.side, given.steps, given.rounds)
    rows = [measure(name, *shape, images, run) for name in given.methods]
    on_cuda = run.device.type == "cuda"
    options = (
        f"--{key} {getattr(given, key)}" for key in ("width", "batch", "steps", "rounds", "threads", "device")
    )
    record = {
        "command": f"python benchmarks/pretrain_speed.py {' '.join(options)}",
        "threads": given.threads,
        "device": torch.cuda.get_device_name(run.device) if on_cuda else "cpu",
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": run.low_precision,
        "torch": torch.__version__,
        "load_average_before": load,
        "shared": "other programs ran on the same cores"
        if load > 0.5 * (os.cpu_count() or 1)
        else "idle machine",
        "width": given.width,
        "batch": given.batch,
        "side": given.side,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
