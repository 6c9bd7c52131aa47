"""The folder of a run: what is left by runs that fail, stop, resume or meet an earlier one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from encoderguard import jobs
from encoderguard.errors import ImageError, OutputError, RunError, SettingError, StorageError
from encoderguard.jobs.folder import RunFolder
from encoderguard.results import read_record
from encoderguard.run import Stopped, StopSignal
from tests.toys import ToyDetector, ToyPretraining, toy_encoder, toy_images

CPU: Any = {"device": "cpu", "precision": "float32"}
TOY = ToyDetector()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_failed_run_leaves_its_record_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        jobs.scan(toy_encoder(), toy_images(), detector=ToyDetector(fail="bug"), out=tmp_path, **CPU)
    record = read_record(tmp_path)
    assert (record.status, record.error) == ("error", "ZeroDivisionError: a bug")
    assert record.encoder is not None
    assert files(tmp_path) == {"result.json"}
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)  # free for the next
    assert read_record(tmp_path).status == "success"


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        jobs.scan(toy_encoder(), toy_images(), detector=ToyDetector(fail="stop"), out=tmp_path, **CPU)
    assert read_record(tmp_path).status == "interrupted"


def test_a_mistake_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "scan"
    with pytest.raises(ImageError):
        jobs.scan(toy_encoder(), "nowhere.npz", detector=TOY, out=out, **CPU)
    assert files(tmp_path) == set()


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    with pytest.raises(OutputError, match="holds a finished run; choose another folder with --out"):
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    record, _ = jobs.scan(
        toy_encoder(), toy_images(), detector=ToyDetector(score=0.75), out=tmp_path, overwrite=True, **CPU
    )
    assert read_record(tmp_path) == record


def test_somebody_elses_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError):
        jobs.pretrain(toy_images(), method=ToyPretraining(), width=2, out=tmp_path, **CPU)
    assert (tmp_path / "encoder.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name", ["encoder.safetensors", "checkpoint_best.pt", "manifest.json", "result.json"]
)
def test_force_never_takes_what_no_run_left(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=f"holds {name}, which no run left there"):
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, overwrite=True, **CPU)
    assert (tmp_path / name).read_bytes() == b"precious"


def test_force_never_takes_an_input(tmp_path: Path) -> None:
    jobs.pretrain(toy_images(), method=ToyPretraining(), width=2, out=tmp_path, **CPU)
    before = files(tmp_path)
    with pytest.raises(OutputError, match="is an input and lies in the folder of the results"):
        jobs.scan(
            str(tmp_path / "encoder.safetensors"),
            toy_images(),
            detector=TOY,
            out=tmp_path / ".." / tmp_path.name,
            overwrite=True,
            **CPU,
        )
    assert files(tmp_path) == before


def test_a_finished_run_stays_until_its_successor_has_finished(tmp_path: Path) -> None:
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for detector, error in (
        (ToyDetector(fail="stop"), Stopped),
        (ToyDetector(fail="bug"), ZeroDivisionError),
    ):
        with pytest.raises(error):
            jobs.scan(toy_encoder(), toy_images(), detector=detector, out=tmp_path, overwrite=True, **CPU)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "out")
    for force in (False, True):
        with pytest.raises(OutputError, match="Another run is at work in"):
            jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path / "out", overwrite=force, **CPU)
    first.abandon()
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path / "out", **CPU)


def test_a_refusal_that_somebody_keeps_holds_no_folder(tmp_path: Path) -> None:
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    with pytest.raises(OutputError) as kept:
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, overwrite=True, **CPU)
    assert "finished run" in str(kept.value)


def test_a_folder_whose_name_is_not_utf8_loses_no_work(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        out.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    record, _ = jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=out, **CPU)
    assert record.folder == str(tmp_path / "caf") + "\\udce9"
    assert read_record(out) == record


class StopAfter:
    """Progress that asks to stop after some steps of training, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self.steps, self.signal = steps, StopSignal()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.signal.requested |= task == "toy" and done >= self.steps


def pretrain_until(steps: int, out: Path, **changes: Any) -> jobs.PretrainResult:
    stopper = StopAfter(steps)
    given: dict[str, Any] = {
        "method": ToyPretraining(),
        "width": 2,
        "progress": stopper,
        "stop": stopper.signal,
    }
    return jobs.pretrain(toy_images(), out=out, **(given | changes), **CPU)


def test_a_killed_run_resumes_to_where_an_unbroken_one_ends(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain_until(3, tmp_path / "broken")
    assert read_record(tmp_path / "broken").status == "interrupted"
    assert files(tmp_path / "broken") == {"result.json", "resume.json", "checkpoint.pt"}
    resumed = pretrain_until(100, tmp_path / "broken", resume=True)
    unbroken = pretrain_until(100, tmp_path / "whole")
    assert resumed.encoder.fingerprint == unbroken.encoder.fingerprint
    assert (resumed.record.resumed, unbroken.record.resumed) == (True, False)
    assert resumed.record.history == unbroken.record.history
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed was 0, now it is 1"),
        ({"method": ToyPretraining(epochs=3)}, "its epochs was 2, now it is 3"),
        ({"count": 16}, "its images was '"),
        ({"width": 4}, "its encoder was '"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Stopped):
        pretrain_until(3, tmp_path)
    before = files(tmp_path)
    with pytest.raises(SettingError, match=message):
        pretrain_until(100, tmp_path, resume=True, **changes)
    assert files(tmp_path) == before


def test_another_image_size_is_not_resumed(tmp_path: Path) -> None:
    def until(steps: int, side: int, **changes: Any) -> None:
        stopper = StopAfter(steps)
        given: dict[str, Any] = {"progress": stopper, "stop": stopper.signal, "image_size": side}
        method = ToyPretraining()
        jobs.pretrain(
            "digits:test", method=method, width=2, count=32, out=tmp_path, **given, **changes, **CPU
        )

    with pytest.raises(Stopped):
        until(3, 16)
    with pytest.raises(SettingError, match="its image size was '16 x 16', now it is '8 x 8'"):
        until(100, 8, resume=True)


def test_an_unfinished_run_is_not_discarded_by_accident(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain_until(3, tmp_path)
    with pytest.raises(OutputError, match="unfinished run; continue it with --resume"):
        pretrain_until(100, tmp_path)
    pretrain_until(100, tmp_path, overwrite=True)
    assert read_record(tmp_path).status == "success"
    assert "checkpoint.pt" not in files(tmp_path)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nothing to resume"):
        pretrain_until(1, tmp_path, resume=True)
    with pytest.raises(SettingError, match="Resuming needs the folder"):
        jobs.pretrain(toy_images(), method=ToyPretraining(), width=2, resume=True, **CPU)


def test_the_identity_of_a_run_is_plain_json(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain_until(1, tmp_path)
    identity = json.loads((tmp_path / "resume.json").read_text())
    assert set(identity) == {
        "job",
        "method",
        "settings",
        "seed",
        "precision",
        "encoder",
        "images",
        "image size",
    }


def test_a_disk_that_fills_up_leaves_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("encoderguard.jobs.pictures.np.savez_compressed", full)
    with pytest.raises(StorageError, match="No space left on device"):
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    assert files(tmp_path) == {"result.json"}
    assert read_record(tmp_path).status == "error"


def test_a_report_that_fails_does_not_take_the_result_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> None:
        raise KeyError("colour")

    monkeypatch.setattr("encoderguard.jobs.job.write_report", broken)
    with pytest.raises(RunError, match=r"finished and recorded.*encoderguard report"):
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, out=tmp_path, **CPU)
    assert read_record(tmp_path).status == "success"
