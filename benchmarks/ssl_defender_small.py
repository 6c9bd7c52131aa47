"""SSLDefender's ablations (its Tables VII to X) in small, on the digits.

The folder is one seed of the main job, or any with backdoored/encoder.safetensors and
backdoored/trigger.json. The defense sees 300 unlabelled images; trigger, target and labels come in to judge.

    python benchmarks/ssl_defender_small.py --story runs/digits-demo/seed-0
        --clean runs/digits-demo/seed-0/clean/encoder.safetensors --rows main VII VIII IX X

Rows are kept in the record as they finish; rows that it already holds are skipped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from encoderguard import jobs
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet, load_images
from encoderguard.random import Rng
from encoderguard.storage import write_text
from encoderguard.triggers import MaskedPattern, Trigger, save_trigger

RESULTS = Path(__file__).parent / "results"
LEARNT = {"recovery": "generators"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "main": [{"seed": 0}, {"seed": 1}, {"seed": 2}],
    "once": [{"seed": 0}],
    "paper": [{"settings": {"mode": "paper", "batch_size": 64, "recovery_batch": 32, "epochs": 100}}],
    "VII": [{"trigger": "random 0"}, {"trigger": "random 1"}],
    "VIII": [{"trigger": "decree"}, {"settings": {**LEARNT, "information": 0.0}}],
    "IX": [
        {"settings": {"paired": 0.0}},
        {"settings": {"paired": 0.0, "beta": 0.0, "utility_floor": 0.0}},
        {"settings": {"paired": 0.0, "alpha": 0.0}},
        {"settings": {"alpha": 0.0, "beta": 0.0}},
    ],
    "X": [{"images": "other"}],
    "generators": [
        *({"seed": seed, "settings": LEARNT} for seed in range(3)),
        {"settings": {**LEARNT, "generators": 1, "lowest": 0.99}},
        {"settings": {**LEARNT, "relative": False}},
        {"settings": {**LEARNT, "mix": "patch"}},
    ],
}


def judged(encoder: Encoder | str, given: argparse.Namespace, **more: Any) -> dict[str, float]:
    """ACC and ASR under the attacker's trigger."""
    record = jobs.evaluate(
        encoder,
        given.train,
        given.test,
        trigger=given.story / "backdoored/trigger.json",
        target=given.target,
        probe="linear",
        **more,
    ).record
    names = ("acc", "asr", "clean_acc", "clean_asr")
    return {name: value for name in names if (value := getattr(record, name)) is not None}


def random_trigger(number: int, side: int) -> MaskedPattern:
    """A square of random colours, a quarter of the side, at a random place."""
    generator = Rng(number).generator("random trigger")
    size = side // 4
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    mask = torch.zeros(side, side)
    mask[top : top + size, left : left + size] = 1
    return MaskedPattern(mask, torch.rand(3, side, side, generator=generator))


def trigger_file(kind: str, suspect: str, images: ImageSet, folder: Path) -> str:
    """The trigger of a row, as a file: random, or what DECREE recovers from 300 images."""
    if kind.startswith("random"):
        trigger: Trigger | None = random_trigger(int(kind.split()[1]), images.shape[0])
    else:
        trigger = jobs.scan(suspect, images, detector="decree", count=300, seed=0).detection.trigger
    if trigger is None:
        raise SystemExit("DECREE recovered no trigger.")
    return str(save_trigger(trigger, folder / "recovered-trigger.json"))


def measured(row: dict[str, Any], suspect: str, given: argparse.Namespace) -> dict[str, Any]:
    """Purify and judge one row."""
    images = load_images(given.other if row.get("images") == "other" else given.images, size=given.size)
    settings = dict(row.get("settings", {}))
    with tempfile.TemporaryDirectory() as folder:
        if "trigger" in row:
            settings["recovered_trigger"] = trigger_file(row["trigger"], suspect, images, Path(folder))
        wall, cpu = time.perf_counter(), time.process_time()
        done = jobs.purify(
            suspect,
            images,
            defense="ssl_defender",
            settings=settings,
            count=300,
            seed=row.get("seed", 0),
        )
    return {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        **judged(done.encoder, given),
        "evidence": done.purified.evidence,
        "loss": {name: curve[-1] for name, curve in done.purified.history.items()},
    }


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--story", type=Path, required=True, help="a folder with backdoored/")
    parser.add_argument("--name", help="of the victim in the record; the folder's by default")
    parser.add_argument("--clean", required=True, help="the clean encoder")
    parser.add_argument("--images", default="digits:train")
    parser.add_argument("--other", default="../shared/data/cifar10:train", help="images of table X")
    parser.add_argument("--train", default="digits:train")
    parser.add_argument("--test", default="digits:test")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=RESULTS / "ssl_defender_digits.json")
    given = parser.parse_args()
    suspect, victim = str(given.story / "backdoored/encoder.safetensors"), given.name or given.story.name
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    record |= {
        "format": "encoderguard.benchmark/1",
        "benchmark": "ssl_defender_small",
        "images": 300,
        "probe": "linear",
        "target": given.target,
        "torch": torch.__version__,
    }
    undefended = record.setdefault("undefended", {})
    if victim not in undefended:
        undefended[victim] = judged(suspect, given, clean_encoder=given.clean)
    for table in given.rows:
        for row in ROWS[table]:
            key = {"table": table, "victim": victim, **row}
            if any(known["row"] == key for known in record["rows"]):
                continue
            found = measured(row, suspect, given)
            record["rows"].append({"row": key, **found})
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(given.out, json.dumps(record, indent=2) + "\n")
            print(key, {name: round(found[name], 4) for name in ("acc", "asr", "cpu_s")}, flush=True)


if __name__ == "__main__":
    main()
