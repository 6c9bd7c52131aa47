"""What the processes of test_parallel.py run: they import it, so it holds no tests."""

import time
from dataclasses import replace
from pathlib import Path

from encoderguard.defenses.mimic import MIMIC
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError
from encoderguard.images import ImageSet
from encoderguard.pretrain.byol import BYOL
from encoderguard.pretrain.simclr import SimCLR
from encoderguard.pretrain.simsiam import SimSiam
from encoderguard.pretrain.supervised import Supervised
from encoderguard.run import Run, Stopped
from tests.toys import toy_encoder, toy_images

# Few steps: later a rounding error may flip a ReLU and is no rounding error any more, in one process too.
SIMCLR = SimCLR(epochs=1, batch_size=8, lr=1e-3, optimizer="sgd", augmentation="moco_v2")
MIMIC_SETTINGS = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "optimizer": "sgd", "schedule": "constant"}


def images() -> ImageSet:
    return toy_images(32, 8, labelled=True)


def several(folder: Path, *, run: Run) -> dict[str, Encoder]:
    """Encoders that must be the same however many processes made them."""
    encoder, data = toy_encoder(), images()
    short = {"epochs": 1, "batch_size": 8, "lr": 1e-3}
    narrow = {"hidden_dim": 8, "optimizer": "sgd"}
    pretrained = {
        "simclr": SIMCLR,
        "byol": BYOL(**short, **narrow, projection_dim=8),  # type: ignore[arg-type]
        "simsiam": SimSiam(**short, hidden_dim=8, predictor_dim=4),  # type: ignore[arg-type]
        "supervised": Supervised(**short, optimizer="sgd"),  # type: ignore[arg-type]
    }
    made = {name: method.train(encoder, data, run=run).encoder for name, method in pretrained.items()}
    # without the contrastive term the head gets no gradient in any process
    for name, weight in (("mimic", 1.0), ("mimic without nt_xent", 0.0)):
        method = MIMIC(**MIMIC_SETTINGS, lambda1=weight)  # type: ignore[arg-type]
        made[name] = method.purify(encoder, data, run=run).encoder
    if run.peers.count > 1:
        interrupted(folder, run)
    return made


def interrupted(folder: Path, run: Run) -> None:
    """Ask the parent to stop after two steps, and wait until that has come through."""

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        run.progress("stop, please" if done == 2 else task, done, total, note)
        until = time.monotonic() + 60
        while done == 2 and not run.stop.requested and time.monotonic() < until:
            time.sleep(0.01)

    first = run.peers.rank == 0
    slow = replace(run, checkpoint=folder / "checkpoint.pt", progress=progress if first else run.progress)
    try:
        SIMCLR.train(toy_encoder(), images(), run=slow)
    except Stopped:
        return
    raise AssertionError("was not stopped")


def failing(*, run: Run) -> None:
    """Fail in the second process alone, while the first one waits for it."""
    if run.peers.rank == 1:
        raise ImageError("the second process found a broken picture")
    run.peers.wait()


def breaking(*, run: Run) -> None:
    """Raise what is no error of ours."""
    raise ZeroDivisionError("a bug")


def showing(*, run: Run) -> None:
    """Show something, and wait for the stop that follows."""
    if run.peers.rank == 0:
        run.progress("showing", 1, 2)
    until = time.monotonic() + 60
    while not run.stop.requested and time.monotonic() < until:
        time.sleep(0.01)
    run.check_stop()
