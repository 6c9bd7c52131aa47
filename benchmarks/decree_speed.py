"""DECREE verdicts: the package against a straightforward run of the authors' schedule, on the same encoders.

The straightforward side behaves as the public code: a float32 encoder whose weights collect gradients, one
restart after another, float64 trigger parameters, stamped *and* clean inputs normalised on every step. Both
sides run in this process on the same images; the record holds wall and CPU seconds, scores and verdicts. CPU
seconds are the ones to compare on a machine that does other work too.

    python benchmarks/decree_speed.py clean.safetensors backdoored.safetensors --images digits --seeds 0 1 2
"""

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.calibration import judge, known_clean
from encoderguard.detectors.decree import Decree
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet, load_images
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.storage import write_text

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


@dataclass
class Straightforward:
    """One restart after another; the smallest mask at any step whose batch cosine exceeds .99."""

    encoder: Encoder
    images: ImageSet
    rng: Rng
    max_epochs: int
    batch_size: int = 128
    steps: list[int] = field(default_factory=list)

    def scores(self, restarts: int) -> list[float]:
        self.encoder.eval().requires_grad_(True)
        return [self._restart(self.rng.child(r)) for r in range(restarts)]

    def _restart(self, rng: Rng) -> float:
        height, width = self.images.shape
        large = height > 64
        drops, patience, lowest = ((200, 500), 35, 1e-7) if large else ((30, 50), 10, 1e-5)
        generator = rng.generator("start")
        mask = _parameter((height, width), generator)
        pattern = _parameter((height, width, 3), generator)
        adam = torch.optim.Adam([mask, pattern], lr=0.5, betas=(0.5, 0.9))
        weight, best, up, down, low, stale, steps = 1e-3, math.inf, 0, 0, 0, 0, 0
        for epoch in range(self.max_epochs):
            adam.param_groups[0]["lr"] = 0.5 if epoch < drops[0] else 0.1 if epoch < drops[1] else 0.05
            order, seen = rng.permutation(len(self.images), "order", epoch), []
            size = min(self.batch_size, len(self.images))
            for first in range(0, len(order) - size + 1, size):
                cosine, norm = self._step(adam, mask, pattern, order[first : first + size], weight)
                seen.append(cosine)
                success, steps, stale = cosine > 0.99, steps + 1, stale + 1
                if success and norm < best:
                    best, stale = norm, 0
                up, down = (up + 1, 0) if success else (0, down + 1)
                low = low + 1 if success and weight < lowest else 0
                if up > 5:
                    up, weight = 0, weight * 5 if weight < 1e5 else weight
                elif down > 5:
                    down, weight = 0, weight / 5 if weight >= lowest else weight
                if low > 10:
                    low, weight = 0, 1e-3
            if sum(seen) / len(seen) > 0.99 and stale > patience:
                break
        self.steps.append(steps)
        return best / (3 * height * width) if best < math.inf else 1.0

    def _step(
        self, adam: torch.optim.Optimizer, mask: Tensor, pattern: Tensor, part: Tensor, weight: float
    ) -> tuple[float, float]:
        clean = self.images.take(part).double().permute(0, 2, 3, 1)
        m = (torch.tanh(mask) / (2 - 1e-7) + 0.5)[..., None].repeat(1, 1, 3)
        t = (torch.tanh(pattern) / (2 - 1e-7) + 0.5) * 255
        stamped = (1 - m) * clean + m * t
        self.encoder.preprocess(
            (clean / 255).permute(0, 3, 1, 2).float()
        )  # transformed on every step, never used
        z = F.normalize(self.encoder((stamped / 255).permute(0, 3, 1, 2).float()), dim=1)
        similarity = z @ z.T
        cosine = (similarity.sum() - similarity.trace()) / (len(z) * (len(z) - 1))
        norm = m.abs().sum()
        adam.zero_grad()
        (-cosine + weight * norm).backward()  # type: ignore[no-untyped-call]
        adam.step()
        return float(cosine.detach()), float(norm.detach())


def _parameter(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.atanh((uniform - 0.5) * (2 - 1e-7)).requires_grad_()


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """The result with wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def compare(path: Path, seed: int, images: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one encoder."""
    encoder = Encoder.load(path)
    detector = Decree(restarts=options.restarts)
    seeds = Rng(seed)
    detection, ours = timed(lambda: detector.detect(encoder, images, run=Run(rng=seeds.child("ours"))))
    plain = Straightforward(encoder.clone(), images, seeds.child("plain"), options.max_epochs)
    scores, theirs = timed(lambda: plain.scores(options.restarts))
    side = max(images.shape)
    table = [entry.score for entry in known_clean(encoder.spec, side, "raw", images.name)]
    verdict = judge(min(scores), tau=detector.tau, margin=detector.margin, table=table).verdict
    return {
        "encoder": path.name,
        "seed": seed,
        "fingerprint": encoder.fingerprint,
        "ours": {
            "score": detection.score,
            "verdict": detection.verdict,
            "below_tau": detection.score < detector.tau,
            "restarts": detection.evidence["restarts"],
            **ours,
        },
        "straightforward": {
            "score": min(scores),
            "verdict": verdict,
            "below_tau": min(scores) < detector.tau,
            "restarts": [{"score": s, "steps": n} for s, n in zip(scores, plain.steps, strict=True)],
            **theirs,
        },
        "wall_ratio": theirs["wall_s"] / ours["wall_s"],
        "cpu_ratio": theirs["cpu_s"] / ours["cpu_s"],
        "same_verdict": detection.verdict == verdict,
    }


def main() -> None:
    """Measure, print one line per encoder, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", nargs="+", type=Path, help="encoder bundles")
    parser.add_argument("--images", default="digits", help="clean images, a specification as for the scan")
    parser.add_argument("--count", type=int, default=1000, help="images drawn from them")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=1000, help="of the straightforward side")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the searches; images are drawn once"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decree_speed.json")
    options = parser.parse_args()
    everything = load_images(options.images)
    images = everything.sample(min(options.count, len(everything)), Rng(0).child("images"))
    rows = []
    for path, seed in itertools.product(options.encoders, options.seeds):
        rows.append(row := compare(path, seed, images, options))
        print(
            f"{row['encoder']} seed {seed}: {row['wall_ratio']:.1f}x wall, {row['cpu_ratio']:.1f}x CPU; "
            f"{row['ours']['score']:.4f} {row['ours']['verdict']} against "
            f"{row['straightforward']['score']:.4f} {row['straightforward']['verdict']}",
            flush=True,
        )
    total = {
        k: sum(r["straightforward"][k] for r in rows) / sum(r["ours"][k] for r in rows)
        for k in ("wall_s", "cpu_s")
    }
    record = {
        "format": "encoderguard.benchmark/1",
        "benchmark": "decree_speed",
        "images": images.name,
        "digest": images.digest,
        "count": len(images),
        "machine": {
            "processor": platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "low_precision": Run(rng=Rng(0)).low_precision,
        "ratio_wall": total["wall_s"],
        "ratio_cpu": total["cpu_s"],
        "same_verdicts": all(row["same_verdict"] for row in rows),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
