"""A grid of seven small cells on the digits, as the files that a user would write."""

import json
from pathlib import Path
from typing import Any

from encoderguard.bench.outcome import comparable

__all__ = ["SIZE", "SUITE", "records_in", "toy_files"]

SUITE = """
title = "A toy grid"
paper = "none"
item = "none"
expected = "Nothing."
defenses = [{ name = "none" }, { name = "mimic" }]
detectors = [{ name = "decree" }]
"""
SIZE = """
images = "digits:train"
auxiliary = "digits:test"
own_task = "digits"
width = 2
pretrain_count = 64
shadow_count = 64
clean_count = 64
scan_count = 32
seeds = [0]
tasks = [{ name = "digits", train = "digits:train", test = "digits:test", target = 0 }]
[settings]
"pretrain.simclr" = { epochs = EPOCHS, batch_size = 32 }
"attack.badencoder" = { epochs = EPOCHS, batch_size = 32, trigger_size = 8 }
"defense.mimic" = { epochs = EPOCHS, batch_size = 32 }
"detector.decree" = { max_steps = 4, batch_size = 8 }
"""


def toy_files(folder: Path, *, epochs: int = 2) -> tuple[Path, Path]:
    """Suite and size; ``epochs`` of two steps each is the length of every training."""
    suite, size = folder / "toy.toml", folder / "toys.toml"
    suite.write_text(SUITE)
    size.write_text(SIZE.replace("EPOCHS", str(epochs)))
    return suite, size


def records_in(store: Path) -> dict[str, Any]:
    """By key: what the finished cells of a store hold, less what differs between two runs."""
    paths = sorted(store.glob("cells/*/*/cell.json"))
    assert all(path.parent.name.startswith(path.parent.parent.name) for path in paths)
    return {path.parent.name: comparable(json.loads(path.read_text())["record"]) for path in paths}
