"""How long one training step takes, as ratios within one run on one machine.

- a MIMIC step as this package does it (one student and one teacher pass, bf16 where it pays, frozen teacher),
against
  the same losses in plain float32 with the five separate passes of the authors' code: three of the student,
  two of a teacher that builds a graph, and a new set of hooks every step that is never removed;
- the share of a SimCLR step that goes into augmentation.

Command: python benchmarks/step_speed.py
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor
from torch.nn import functional as F

from encoderguard.augment import SIMCLR
from encoderguard.defenses.mimic import MIMIC
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.losses import nt_xent
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.training import Batch

TAPS = ("layer1", "layer2", "layer3", "layer4")


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Median time of a step after one to warm up."""
    step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return median(times)


def encoder(width: int, seed: int) -> Encoder:
    """ResNet-18 for 32 px."""
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=width), Rng(seed))


def mimic_step(width: int, images: Tensor, run: Run) -> Callable[[], object]:
    """The step of ``MIMIC.purify``, without the loop around it."""
    teacher, student = encoder(width, 0).frozen(), encoder(width, 1).train()
    head = SimCLRProjectionHead(8 * width, 8 * width, 128)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=1e-3, fused=True)
    method, batch = MIMIC(mode="authors"), Batch(images, torch.arange(len(images)), Rng(0))

    def step() -> None:
        with run.autocast():
            terms = method._terms(batch, teacher, student, head, [1.0] * 4)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        optimizer.step()

    return step


def plain_step(width: int, images: Tensor) -> Callable[[], object]:
    """Float32, five passes, hooks that pile up."""
    teacher, student = encoder(width, 0).eval(), encoder(width, 1).train()
    teacher.backbone.to(memory_format=torch.contiguous_format)
    student.backbone.to(memory_format=torch.contiguous_format)
    head = SimCLRProjectionHead(8 * width, 8 * width, 128)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-3)
    kept: list[dict[str, Tensor]] = []

    def tapped(model: Encoder, views: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for tap in TAPS:
            module = model.backbone.get_submodule(tap)
            module.register_forward_hook(
                lambda module, inputs, output, tap=tap: maps.__setitem__(tap, output)
            )
        model(views)
        kept.append(maps)
        return maps

    def step() -> None:
        kept.clear()
        generator = Rng(0).generator("views")
        first, second = SIMCLR(images, generator), SIMCLR(images, generator)
        contrast = nt_xent(head(student(first)), head(student(second)), 0.5)
        aim, got = tapped(teacher, first), tapped(student, first)
        attention = sum(_attention(got[tap], aim[tap]) for tap in TAPS)
        clone = 1 - F.cosine_similarity(teacher(first), got["layer4"].mean((2, 3))).mean()
        optimizer.zero_grad()
        teacher.zero_grad()
        torch.autograd.backward(contrast + clone + attention)
        optimizer.step()

    return step


def _attention(a: Tensor, b: Tensor) -> Tensor:
    maps = [F.normalize(x.pow(2).sum(1).flatten(1), dim=1) for x in (a, b)]
    return (maps[0] - maps[1]).square().mean()


def simclr_step(width: int, images: Tensor, run: Run, *, augment: bool) -> Callable[[], object]:
    """A SimCLR step with fresh views, or with views made beforehand."""
    student = encoder(width, 0).train()
    head = SimCLRProjectionHead(8 * width, 8 * width, 128)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-3, fused=True)
    generator = Rng(0).generator()
    ready = torch.cat([SIMCLR(images, generator), SIMCLR(images, generator)])

    def step() -> None:
        views = torch.cat([SIMCLR(images, generator), SIMCLR(images, generator)]) if augment else ready
        with run.autocast():
            first, second = head(student(views)).chunk(2)
            loss = nt_xent(first, second, 0.5)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def measure(width: int, batch: int, repeats: int) -> dict[str, Any]:
    """All timings for one width."""
    images, run = torch.rand(batch, 3, 32, 32, generator=Rng(0).generator()), Run(rng=Rng(0))
    ours, plain = (
        seconds(mimic_step(width, images, run), repeats),
        seconds(plain_step(width, images), repeats),
    )
    whole = seconds(simclr_step(width, images, run, augment=True), repeats)
    bare = seconds(simclr_step(width, images, run, augment=False), repeats)
    views = seconds(lambda: (SIMCLR(images, Rng(0).generator()), SIMCLR(images, Rng(1).generator())), repeats)
    return {
        "width": width,
        "batch": batch,
        "mimic_step_seconds": ours,
        "plain_step_seconds": plain,
        "mimic_speedup": plain / ours,
        "simclr_step_seconds": whole,
        "simclr_step_without_augmentation_seconds": bare,
        "augmentation_seconds": views,
        "augmentation_share": views / whole,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_speed.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(width, given.batch, given.repeats) for width in given.widths]
    record = {
        "command": f"python benchmarks/step_speed.py --threads {given.threads}",
        "threads": given.threads,
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": Run(rng=Rng(0)).low_precision,
        "torch": torch.__version__,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
