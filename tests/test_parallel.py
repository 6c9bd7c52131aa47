"""Several processes that share each training step end where one process ends."""

from pathlib import Path
from typing import Any

import pytest
import torch

from encoderguard import jobs
from encoderguard.augment import AUGMENTATIONS
from encoderguard.cli import main
from encoderguard.disturbance import random_noise, random_patches
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderGuardError, ImageError, RunError, SettingError
from encoderguard.images import ImageSet
from encoderguard.parallel import spread
from encoderguard.peers import Peers
from encoderguard.random import Rng
from encoderguard.run import Run, StopSignal
from tests import parallel_work as work
from tests.toys import toy_encoder, toy_images

MADE = ("simclr", "byol", "simsiam", "supervised", "mimic", "mimic without nt_xent")


def difference(one: Encoder, other: Encoder) -> float:
    """The largest of any weight or BatchNorm statistic."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Encoder]:
    return work.several(folder, run=Run(rng=Rng(0), precision="float32"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[str, Encoder]:
    stop = StopSignal()

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        stop.requested = stop.requested or task == "stop, please"

    run = Run(rng=Rng(0), precision="float32", progress=progress, stop=stop)
    return spread(work.several, folder, run=run, devices=2).result


@pytest.mark.parametrize("name", MADE)
def test_two_processes_train_the_network_of_one(
    name: str, alone: dict[str, Encoder], shared: dict[str, Encoder]
) -> None:
    moved = [
        (a - b).abs().max() for a, b in zip(alone[name].parameters(), toy_encoder().parameters(), strict=True)
    ]
    assert max(moved) > 1e-3  # it did learn
    assert difference(alone[name], shared[name]) < 1e-5
    assert [type(part) for part in shared[name].modules()] == [type(part) for part in alone[name].modules()]


def test_one_process_finishes_what_two_began(
    folder: Path, alone: dict[str, Encoder], shared: dict[str, Encoder]
) -> None:
    checkpoint = folder / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    run = Run(rng=Rng(0), precision="float32", checkpoint=checkpoint, resume=True)
    assert (
        difference(work.SIMCLR.train(toy_encoder(), work.images(), run=run).encoder, alone["simclr"]) < 1e-5
    )


def test_a_job_says_how_many_devices_shared_it(tmp_path: Path, alone: dict[str, Encoder]) -> None:
    seen: list[str] = []
    done = jobs.purify(
        toy_encoder(),
        work.images(),
        settings=work.MIMIC_SETTINGS,
        out=tmp_path / "out",
        device="cpu",
        devices=2,
        precision="float32",
        progress=lambda task, *rest: seen.append(task),
    )
    assert (done.record.devices, done.record.status) == (2, "success")
    assert done.record.peak_memory_bytes
    assert done.record.history["loss"]
    assert seen.count("distilling") == 4  # one process shows them
    assert not list((tmp_path / "out").glob("checkpoint*"))
    stored = Encoder.load(tmp_path / "out" / "encoder.safetensors")
    again = jobs.purify(
        toy_encoder(), work.images(), settings=work.MIMIC_SETTINGS, device="cpu", precision="float32"
    )
    assert again.record.devices == 1
    assert difference(stored, again.encoder) < 1e-5


@pytest.mark.parametrize(
    ("failing", "kind", "message"),
    [
        (work.failing, ImageError, "^the second process found a broken picture"),
        (work.breaking, RunError, "^ZeroDivisionError: a bug"),
    ],
)
def test_an_error_in_any_process_is_the_error(
    failing: Any, kind: type[EncoderGuardError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        spread(failing, run=Run(rng=Rng(0)), devices=2)


def test_a_reader_of_progress_that_fails_ends_the_work() -> None:
    def progress(task: str, done: int, total: int, note: str = "") -> None:
        raise ZeroDivisionError("a bug in the reader")

    with pytest.raises(ZeroDivisionError, match="a bug in the reader"):
        spread(work.showing, run=Run(rng=Rng(0), progress=progress), devices=2)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(SettingError, match="must be defined in a module that can be imported"):
        spread(lambda run: None, run=Run(rng=Rng(0)), devices=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"settings": {"batch_size": 9}},
            "9 images cannot be shared evenly by 2 devices; choose a batch size",
        ),
        (
            {"method": "moco"},
            "'moco' cannot be shared by 2 devices; use one device, or one of: byol, simclr,",
        ),
        ({"devices": 0}, "number of devices must be at least 1, found 0"),
        ({"device": "cpu:0"}, "found the device 'cpu:0'; give cpu or cuda"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"devices": 2, "device": "cpu", "width": 2} | arguments
    settings = {"batch_size": 8} | given.pop("settings", {})
    with pytest.raises(SettingError, match=message):
        jobs.pretrain(toy_images(16, 8), settings=settings, **given)


def test_other_jobs_refuse_several_devices() -> None:
    with pytest.raises(SettingError, match=r"'decree' cannot be shared by 2 devices; use one device\.$"):
        jobs.scan(toy_encoder(), toy_images(), devices=2)


def test_the_command_line_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "moco", "--devices", "2"]) == 4
    assert main(["pretrain", "--devices", "3", "-p", "batch_size=32"]) == 4
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert "A batch of 32 images cannot be shared evenly by 3 devices" in shown[1]


def test_canvases_stay_on_one_device() -> None:
    canvases = torch.zeros(8, 3, 20, 12, dtype=torch.uint8)
    pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    images = ImageSet.from_arrays(pixels, canvases=canvases)
    run = Run(rng=Rng(0), peers=Peers(0, 2))
    with pytest.raises(ImageError, match="8 appended canvases, which several devices cannot share"):
        work.SIMCLR.train(toy_encoder(), images, run=run)


def test_shares_are_those_of_the_whole() -> None:
    whole = torch.rand(6, 3, 8, 8, generator=Rng(3).generator())
    peers = [Peers(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([each.share(whole) for each in peers]), whole)
    augmentation = AUGMENTATIONS["moco_v2"]
    parts = [augmentation(each.share(whole), Rng(4).generator(), peers=each) for each in peers]
    torch.testing.assert_close(torch.cat(parts), augmentation(whole, Rng(4).generator()))


@pytest.mark.parametrize("disturb", [random_patches, random_noise])
def test_disturbances_of_stacked_views_are_those_of_the_whole(disturb: Any) -> None:
    first, second = torch.rand(2, 6, 3, 8, 8, generator=Rng(5).generator())
    whole = disturb(torch.cat([first, second]), 0.7, Rng(6).generator())
    for each in (Peers(rank, 3) for rank in range(3)):
        own = torch.cat([each.share(first), each.share(second)])
        expected = torch.cat([each.share(part) for part in whole.chunk(2)])
        assert torch.equal(disturb(own, 0.7, Rng(6).generator(), peers=each, views=2), expected)


def test_a_process_alone_changes_nothing() -> None:
    generator, other = Rng(7).generator(), Rng(7).generator()
    assert torch.equal(Peers().rand(12, 5, generator), torch.rand((12, 5), generator=other))
    assert torch.equal(Peers().mean(torch.ones(3)), torch.ones(3))
