"""How long one step of BadEncoder takes on the shared loop, against the way of the authors' code, in one run.

Ours: one joint forward pass of stamped images, clean images, the reference and a few augmented references;
the clean features were computed once for the whole shadow set; channels last; float32, and bf16 if it pays.
Theirs: float32; the clean encoder sees batch and references at every step; the encoder under attack takes the
batch, its stamped copy, one copy of the reference per image and one augmented reference per image, in four
passes. The losses are the same.

Times are processor time of all threads, which other programs on the machine disturb least.

Command: python benchmarks/planting_speed.py
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
from torch import Tensor
from torch.nn import functional as F

from encoderguard.attacks.badencoder import BadEncoder
from encoderguard.augment import SIMCLR_NO_CROP
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet
from encoderguard.methods import Reference
from encoderguard.planting import Planter, freeze_batch_norm, pair_up
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.training import Batch
from encoderguard.triggers import Patch


def encoder(width: int) -> Encoder:
    """ResNet-18 for 32 px."""
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=width), Rng(0)).eval()


def sgd(model: Encoder, *, fused: bool) -> torch.optim.Optimizer:
    """The authors' optimiser."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=fused)


def shared_step(width: int, images: ImageSet, run: Run) -> Callable[[], object]:
    """The step of ``BadEncoder.plant``, without the loop around it."""
    pairs = pair_up([Patch()], [Reference(image=images.take([0])[0])], images.shape)
    planter, method = Planter(encoder(width), images, pairs, run=run), BadEncoder()
    batch = Batch(images.take(range(len(images))).float() / 255, torch.arange(len(images)), Rng(0))
    optimizer = sgd(planter.victim, fused=True)

    def step() -> None:
        with run.autocast():
            terms = method.terms(planter.features(batch), None)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        optimizer.step()

    return step


def authors_step(width: int, images: ImageSet) -> Callable[[], object]:
    """The same losses as the authors' code computes them."""
    clean, victim = encoder(width).frozen(), freeze_batch_norm(encoder(width))
    for model in (clean, victim):
        model.backbone.to(memory_format=torch.contiguous_format)
    pixels = images.take(range(len(images))).float() / 255
    copies = pixels[:1].expand_as(pixels).contiguous()
    optimizer, generator = sgd(victim, fused=False), Rng(0).generator()

    def unit(model: Encoder, batch: Tensor) -> Tensor:
        return F.normalize(model(batch), dim=1)

    def step() -> None:
        views = SIMCLR_NO_CROP(copies, generator)
        with torch.no_grad():
            before, aim = unit(clean, pixels), unit(clean, copies)
        kept, triggered = unit(victim, pixels), unit(victim, Patch()(pixels))
        target, seen = unit(victim, copies), unit(victim, views)
        pairs = ((triggered, target), (seen, aim), (kept, before))
        loss = torch.stack([-(a * b).sum(1).mean() for a, b in pairs]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def seconds(steps: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median processor time of each step, taken in turn so that other load falls on all alike."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            began = time.process_time()
            step()
            taken.append(time.process_time() - began)
    return [median(taken) for taken in times]


def measure(width: int, batch: int, repeats: int) -> dict[str, Any]:
    """All timings for one width."""
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), generator=Rng(0).generator(), dtype=torch.uint8)
    images = ImageSet.from_arrays(pixels, name="noise")
    plain, quick = Run(rng=Rng(0), precision="float32"), Run(rng=Rng(0))
    runs = [plain, quick] if quick.low_precision else [plain]
    steps = [shared_step(width, images, run) for run in runs]
    *ours, theirs = seconds([*steps, authors_step(width, images)], repeats)
    return {
        "width": width,
        "batch": batch,
        "authors_step_seconds": theirs,
        "shared_step_float32_seconds": ours[0],
        "speedup_float32": theirs / ours[0],
        "shared_step_bf16_seconds": ours[1] if len(ours) > 1 else None,
        "speedup_bf16": theirs / ours[1] if len(ours) > 1 else None,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[16])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planting_speed.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(width, given.batch, given.repeats) for width in given.widths]
    record = {
        "command": f"python benchmarks/planting_speed.py --threads {given.threads}",
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
