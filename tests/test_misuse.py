"""Bad input, as a user meets it: one sentence, the right exit code, no traceback, nothing half-written."""

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from encoderguard import registry
from encoderguard.bundles import FORMAT
from encoderguard.cli import main
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.random import Rng
from encoderguard.results import read_record
from tests.toys import TOYS, toy_encoder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one good encoder; the toy methods are known."""
    monkeypatch.chdir(tmp_path)
    for toy in TOYS:
        monkeypatch.setitem(registry._METHODS, (toy.family, toy.name), toy)
    toy_encoder().save(tmp_path / "good.safetensors")
    return tmp_path


def pictures(folder: str, count: int = 12) -> None:
    Path(folder).mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / f"{number:03}.png")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 4) -> str:
    """Run the command line; it must fail with one sentence and leave nothing behind. Returns the sentence."""
    before = sorted(Path().rglob("*"))
    assert main([*arguments, "--device", "cpu"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    errors = [line for line in said.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert errors[0].endswith(".")
    if code == 4:
        assert sorted(Path().rglob("*")) == before
    assert not list(Path().rglob("*.part"))
    return errors[0]


def scan(*extra: str, encoder: str = "good.safetensors", images: str = "digits:test") -> tuple[str, ...]:
    return ("scan", encoder, "--detector", "toy", "--images", images, *extra)


def test_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No pictures at 'nowhere'" in refused(capsys, *scan(images="nowhere"))


def test_empty_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "empty holds no pictures" in refused(capsys, *scan(images="empty"))


def test_fewer_images_than_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    pictures("few")
    sentence = refused(
        capsys, "purify", "good.safetensors", "--defense", "toy", "--images", "few", "-p", "batch_size=64"
    )
    assert "at least 64 images" in sentence
    assert "12" in sentence


def test_corrupt_image(capsys: pytest.CaptureFixture[str]) -> None:
    pictures("some")
    broken = Path("some/007.png")
    broken.write_bytes(broken.read_bytes()[:100])
    assert "007.png" in refused(capsys, *scan(images="some"))
    assert main([*scan("--skip-unreadable", "--out", "out", images="some"), "--device", "cpu"]) == 0
    images = read_record(Path("out")).images
    assert images is not None
    assert images.count == 11
    assert [Path(name).name for name in images.skipped] == ["007.png"]


def test_a_text_file_is_no_image(capsys: pytest.CaptureFixture[str]) -> None:
    pictures("some")
    Path("some/notes.png").write_text("not a picture")
    assert "notes.png" in refused(capsys, *scan(images="some"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((8, 16, 16), np.uint8)}, r"(8, 16, 16)"),
        ({"images": np.zeros((8, 3, 16, 16), np.uint8)}, r"(8, 3, 16, 16)"),
        ({"images": np.zeros((8, 16, 16, 3), np.float32)}, "float32"),
        ({"pictures": np.zeros((8, 16, 16, 3), np.uint8)}, "pictures"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "pickled objects are refused"),
    ],
)
def test_wrong_npz(capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], message: str) -> None:
    np.savez("set.npz", **arrays)
    assert message in refused(capsys, *scan(images="set.npz"))


def test_checkpoint_of_another_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    other = Encoder.build(EncoderSpec(architecture="encoderguard:resnet34", width=2), Rng(0))
    torch.save(other.backbone.state_dict(), "other.pth")
    assert "should hold a resnet18, found" in refused(capsys, *scan(encoder="resnet18:other.pth"))


def test_checkpoint_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"layer.weight": torch.zeros(3, 3)}, "other.pth")
    assert "other.pth" in refused(capsys, *scan(encoder="resnet18:other.pth"))
    Path("not.safetensors").write_bytes(b"hello")
    assert "not a readable safetensors file" in refused(capsys, *scan(encoder="not.safetensors"))


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("how", ["pickle", "torch", "inside"])
def test_a_malicious_checkpoint_does_nothing(capsys: pytest.CaptureFixture[str], how: str) -> None:
    if how == "pickle":
        Path("bad.pth").write_bytes(pickle.dumps(Malice()))
    else:
        torch.save({"state_dict": Malice()} if how == "inside" else Malice(), "bad.pth")
    assert "bad.pth" in refused(capsys, *scan(encoder="resnet18:bad.pth"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (scan("--colour", "red"), "No such option: --colour"),
        (("bake",), "No such "),
        (("scan",), "Missing argument 'ENCODER'"),
        (
            scan("-p", "colour=red"),
            "Unknown setting 'colour' of detector 'toy'; expected one of: fail, score, verdict",
        ),
        (scan("-p", "score=high"), "Setting 'score' of detector 'toy' cannot be 'high'"),
        (scan("-p", "verdict=safe"), "Setting 'verdict' of detector 'toy' cannot be 'safe'"),
        (scan("-p", "score"), "must be given as NAME=VALUE, found 'score'"),
        (scan("--detector", "oracle"), "Unknown detector 'oracle'; expected one of:"),
        (scan("--count", "0"), "Invalid value for '--count'"),
        (scan("--seed", "one"), "Invalid value for '--seed'"),
        (scan("--precision", "fp8"), "Invalid value for '--precision'"),
        (scan("--image-size", "1"), "Invalid value for '--image-size'"),
        (scan(images="x" * 300), "cannot be used: File name too long; give another path"),
        (scan(encoder="x" * 300 + ".safetensors"), "cannot be used: File name too long; give another"),
        (scan("--out", "x" * 300), "File name too long"),
        (scan(encoder="ghost.safetensors"), "There is no encoder file ghost.safetensors"),
        (scan(encoder="ghost"), "Unknown encoder specification 'ghost'"),
        (("attack", "toy", "good.safetensors"), "either --reference, or --downstream with --target"),
        (
            ("attack", "toy", "good.safetensors", "--downstream", "digits:train"),
            "--downstream needs --target",
        ),
        (("evaluate", "good.safetensors", "--target", "3"), "pass --trigger too"),
        (("evaluate", "good.safetensors", "--trigger", "ghost.json"), "There is no trigger file ghost.json"),
        (("evaluate", "good.safetensors", "--probe", "divining"), "Unknown probe 'divining'"),
        (("pretrain", "toy", "--resume"), "nothing to resume"),
        (("pretrain", "toy", "--stem", "root"), "Invalid value for '--stem'"),
        (("pretrain", "toy", "--arch", "resnet17"), "resnet17"),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [(), ("report", "nowhere"), ("list", "--colour")])
def test_wrong_arguments_of_the_small_commands(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert main(arguments) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("Error: ") == 1
    assert "Traceback" not in said.err


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    assert main([*scan(), "--device", "abacus"]) == 4
    assert "The device 'abacus' is not available here" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_output_path_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("in the way")
    for out in ("file", "file/below"):
        assert refused(capsys, *scan("--out", out)).startswith("Error: ")
    assert "must be a folder" in refused(capsys, *scan("--out", "file"))


def test_read_only_output_path(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("encoderguard.storage.tempfile.NamedTemporaryFile", denied)
    assert "Permission denied. Choose a path that can be written" in refused(capsys, *scan())


def test_full_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("encoderguard.storage.os.fsync", full)
    sentence = refused(capsys, "pretrain", "toy", "--width", "2", "--count", "16", "--out", "out", code=2)
    assert "No space left on device" in sentence
    assert not list(Path("out").iterdir())


def test_disk_that_fills_up_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, [0]

    def filling(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 2:  # the identity of the run and its encoder are stored, the arrays are not
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("encoderguard.storage.os.fsync", filling)
    sentence = refused(capsys, "pretrain", "toy", "--width", "2", "--count", "16", "--out", "out", code=2)
    assert "No space left on device" in sentence
    assert {path.name for path in Path("out").iterdir()} <= {"result.json"}


def test_a_device_without_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*scan(), "--device", "meta"]) == 4
    assert "The device 'meta' is not available here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (np.zeros(3), "is not a trigger file with the arrays 't' and 'tm'"),
        ({"t": np.array(["x"]), "tm": np.array(["y"])}, "is not a trigger file with the arrays 't' and 'tm'"),
        ({"t": np.zeros(3), "tm": np.zeros(3)}, "expected 't' and 'tm' of shape [1, H, W, 3]"),
    ],
)
def test_arrays_that_are_no_trigger(capsys: pytest.CaptureFixture[str], arrays: Any, message: str) -> None:
    with Path("trigger.npz").open("wb") as stream:
        if isinstance(arrays, dict):
            np.savez(stream, **arrays)
        else:
            np.save(stream, arrays)
    told = refused(capsys, "evaluate", "good.safetensors", "--trigger", "trigger.npz", "--target", "3")
    assert message in told


@pytest.mark.parametrize(
    ("label", "found"),
    [(np.array([]), "float64 [0]"), (np.array(["a"]), "<U1 [1]"), (np.array([-1]), "int64 [1]")],
)
def test_labels_that_are_none(capsys: pytest.CaptureFixture[str], label: Any, found: str) -> None:
    np.savez("reference.npz", x=np.zeros((1, 8, 8, 3), dtype=np.uint8), y=label)
    told = refused(capsys, "attack", "toy", "good.safetensors", "--reference", "reference.npz")
    assert f"expected 'y' to be one label from 0 on, found {found}" in told


def test_text_is_not_said_to_run_code(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.pth").write_text("hello, world, this is a text and no checkpoint at all")
    assert "cannot be read as a PyTorch checkpoint" in refused(capsys, *scan(encoder="resnet18:notes.pth"))


@pytest.mark.parametrize("change", [{"width": -4}, {"input_size": 0}])
def test_a_bundle_with_an_impossible_specification(
    capsys: pytest.CaptureFixture[str], change: dict[str, int]
) -> None:
    tensors, header = (
        {"x": torch.zeros(1)},
        {"format": FORMAT, "spec": {"architecture": "encoderguard:resnet18"} | change},
    )
    save_file(tensors, "odd.safetensors", metadata={"encoderguard": json.dumps(header)})
    assert "is not valid: Input should be greater than" in refused(capsys, *scan(encoder="odd.safetensors"))
