"""What defenses and detectors do when a quarter of the images taken for clean carries the trigger.

Each method runs twice on the same 300 digits: as they are, and with every fourth stamped by the attacker's
trigger. It is told nothing.

    encoderguard demo --out runs/digits-demo
    python benchmarks/poisoned_clean_set.py --story runs/digits-demo/seed-0

The folder needs clean/encoder.safetensors, backdoored/encoder.safetensors and backdoored/trigger.json. Rows
are kept in the record as they finish; rows that it already holds are skipped.
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
from encoderguard.random import Rng
from encoderguard.storage import write_text
from encoderguard.triggers import Trigger, load_trigger

RESULTS = Path(__file__).parent / "results"
DEFENSES = ("mimic", "finetune", "fine_pruning", "nad", "anp", "ssl_kd", "medic", "ssl_defender")
DETECTORS = ("decree",)
SETTINGS: dict[str, dict[str, Any]] = {"mimic": {"batch_size": 100, "epochs": 100}}
"""The main job's, where its batches and lengths are not the defaults."""


def stamped(images: ImageSet, trigger: Trigger, share: float, seed: int) -> ImageSet:
    """The same images with the trigger on a seeded draw of ``share`` of them."""
    pixels = images.take(torch.arange(len(images))).clone()
    chosen = Rng(seed).permutation(len(images), "stamped")[: round(share * len(images))]
    pixels[chosen] = (trigger(pixels[chosen].float() / 255) * 255).round().to(torch.uint8)
    return ImageSet.from_arrays(pixels, name=f"{images.name}, {share:.0%} stamped")


def judged(encoder: Encoder | str, given: argparse.Namespace) -> dict[str, Any]:
    """ACC and ASR, beside those of the clean encoder."""
    record = jobs.evaluate(
        encoder,
        given.train,
        given.test,
        trigger=given.story / "backdoored/trigger.json",
        target=given.target,
        clean_encoder=str(given.story / "clean/encoder.safetensors"),
        probe="linear",
    ).record
    return {key: getattr(record, key) for key in ("acc", "asr", "clean_acc", "clean_asr")}


def defended(name: str, images: ImageSet, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Purify and judge."""
    done = jobs.purify(
        str(given.story / "backdoored/encoder.safetensors"),
        images,
        defense=name,
        settings=SETTINGS.get(name),
        count=len(images),
        seed=seed,
    )
    return judged(done.encoder, given)


def scanned(name: str, images: ImageSet, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The verdict on the backdoored encoder and on the clean one."""
    found = {}
    for encoder in ("backdoored", "clean"):
        suspect = str(given.story / encoder / "encoder.safetensors")
        seen = jobs.scan(suspect, images, detector=name, count=len(images), seed=seed).detection
        found[encoder] = {"verdict": seen.verdict, "score": seen.score}
    return found


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--story", type=Path, required=True, help="one seed of the main job")
    parser.add_argument("--images", default="digits:train")
    parser.add_argument("--train", default="digits:train")
    parser.add_argument("--test", default="digits:test")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--methods", nargs="+", default=[*DETECTORS, *DEFENSES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "poisoned_clean_set.json")
    given = parser.parse_args()
    trigger = load_trigger(given.story / "backdoored/trigger.json")
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    record |= {
        "command": "python benchmarks/poisoned_clean_set.py --story runs/digits-demo/seed-0",
        "images": given.count,
        "share": given.share,
        "target": given.target,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if "undefended" not in record:
        record["undefended"] = judged(str(given.story / "backdoored/encoder.safetensors"), given)
    for seed in given.seeds:
        clean = load_images(given.images).sample(given.count, Rng(seed))
        for name in given.methods:
            for share in (0.0, given.share):
                key = {"method": name, "stamped": share, "seed": seed}
                if any(row["row"] == key for row in record["rows"]):
                    continue
                images, began = stamped(clean, trigger, share, seed), time.process_time()
                found = (scanned if name in DETECTORS else defended)(name, images, given, seed)
                record["rows"].append({"row": key, **found, "cpu_s": round(time.process_time() - began, 1)})
                write_text(given.out, json.dumps(record, indent=1) + "\n")
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
