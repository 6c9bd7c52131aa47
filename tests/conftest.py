"""What every test shares: one thread per worker, no display, repeatable examples, the real image packs."""

import os
from pathlib import Path

# Read when torch and matplotlib are first imported, so they stand before those imports.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A slow machine is not a failing test, and the same commit gives the same examples everywhere.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real image packs (cifar10/, gtsrb/, ...); the test is skipped where there is none."""
    folder = Path(os.environ.get("ENCODERGUARD_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the real image packs: there is no folder {folder}; set ENCODERGUARD_DATA")
    return folder
