"""DECREE's score on clean encoders of the digits recipe: what the demo's verdict is judged against.

Command: python benchmarks/digits_clean_scores.py --seeds 8
Cost: about a minute per seed on one core. The seeds start at 100; the demo's own start at 0.
"""

import argparse
import json
from pathlib import Path

import torch

from encoderguard.jobs import pretrain, scan
from encoderguard.recipes import recipe_named


def main() -> None:
    """Pre-train, scan, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits_clean_scores.json"))
    given = parser.parse_args()
    recipe = recipe_named("digits")
    settings = {key: value for key, value in recipe.scan.items() if key != "clean_scores"}
    rows = []
    for seed in range(given.first, given.first + given.seeds):
        encoder = pretrain(recipe.images, settings=recipe.pretrain, width=recipe.width, seed=seed).encoder
        found = scan(encoder, recipe.images, count=recipe.scan_count, settings=settings, seed=seed).record
        rows.append({"seed": seed, "fingerprint": encoder.fingerprint, "score": found.score})
        print(rows[-1], flush=True)
    record = {
        "command": f"python benchmarks/digits_clean_scores.py --first {given.first} --seeds {given.seeds}",
        "recipe": recipe.model_dump(mode="json", exclude={"scan"}),
        "scan_settings": settings,
        "scores": rows,
        "versions": {"torch": torch.__version__},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
