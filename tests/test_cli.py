import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from encoderguard import registry
from encoderguard.cli import main
from encoderguard.cli.options import parse_settings
from encoderguard.cli.running import default_folder
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import Purified
from encoderguard.results import ScanRecord, parse_record, read_record, write_record
from encoderguard.run import Run
from encoderguard.triggers import Patch, save_trigger
from tests.toys import TOYS, ToyDefense, ToyDetector, ToyPretraining, toy_encoder


class Said(NamedTuple):
    code: int
    out: str
    err: str


Shell = Callable[..., Said]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command line with the toy methods, in a folder that holds ``suspect.safetensors`` only."""
    monkeypatch.chdir(tmp_path)
    for toy in TOYS:
        monkeypatch.setitem(registry._METHODS, (toy.family, toy.name), toy)
    toy_encoder().save(tmp_path / "suspect.safetensors")

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        given = [str(argument) for argument in arguments]
        jobs = {"pretrain", "attack", "scan", "purify", "evaluate"}
        code = main(
            [*given, "--device", "cpu", "--precision", "float32"] if given and given[0] in jobs else given
        )
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


SCAN = ("scan", "suspect.safetensors", "--detector", "toy", "--images", "digits:test", "--count", "16")
PRETRAIN = ("pretrain", "toy", "--width", "2", "--count", "16", "--image-size", "16")


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("backdoored", 1), ("inconclusive", 3)])
def test_the_exit_code_tells_the_verdict(shell: Shell, verdict: str, code: int) -> None:
    assert shell(*SCAN, "-p", f"verdict={verdict}").code == code


def test_the_reader_of_standard_output_may_go_and_the_verdict_stays(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main([*SCAN, "-p", "verdict=backdoored", "--device", "cpu"]) == 1
    sys.stdout.close()


def test_a_suspect_that_comes_back_as_it_was_is_no_success(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: ToyDefense, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        return Purified(encoder=encoder.clone(), history={}, evidence={"fallback": "it broke off"})

    monkeypatch.setattr(ToyDefense, "purify", nothing)
    said = shell("purify", "suspect.safetensors", "--defense", "toy", "--images", "digits:test", "--out", "x")
    assert said.code == 3
    assert "changed nothing: what it returned is the suspect encoder itself" in said.out
    assert "Warning: it broke off" in said.err


@pytest.mark.parametrize("job", ["scan", "purify"])
def test_the_images_of_an_encoder_are_never_guessed(shell: Shell, job: str) -> None:
    said = shell(job, "suspect.safetensors")
    assert said.code == 4
    assert "Missing option '--images'" in said.err


def test_json_is_the_record_and_nothing_else(shell: Shell, tmp_path: Path) -> None:
    said = shell(*SCAN, "--json", "--out", "here", "-p", "score=0.125")
    data = json.loads(said.out)
    assert {"verdict", "score", "threshold", "detector", "seconds"} <= set(data)
    assert (data["verdict"], data["score"], data["detector"]) == ("clean", 0.125, "toy")
    assert data["settings_passed"] == {"score": "0.125"}
    assert data["command"][0] == "encoderguard"
    assert parse_record(said.out) == read_record(tmp_path / "here")


def test_people_are_told_what_was_tested_and_never_that_it_is_safe(shell: Shell) -> None:
    for verdict in ("clean", "backdoored", "inconclusive"):
        said = shell(*SCAN, "-p", f"verdict={verdict}", "--out", verdict)
        assert f"({verdict})" in said.out
        assert "score 0.5, threshold 0.25" in said.out
        assert "score / threshold = 2.00" in said.out
        assert "Tested:" in said.out
        assert "Not tested:" in said.out
        assert f"Report: {verdict}/report.html" in said.out
        assert "safe" not in said.out.replace("safetensors", "").lower()


def test_every_run_has_a_folder_of_its_own(shell: Shell, tmp_path: Path) -> None:
    shell(*SCAN)
    shell(*SCAN)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["scan-toy", "scan-toy-2"]
    assert json.loads(shell(*SCAN, "--json").out)["folder"] == "runs/scan-toy-3"


def test_a_named_folder_is_replaced_only_by_force(shell: Shell) -> None:
    assert shell(*SCAN, "--out", "here").code == 0
    again = shell(*SCAN, "--out", "here")
    assert again.code == 4
    assert "here holds a finished run" in again.err
    assert shell(*SCAN, "--out", "here", "--force").code == 0


def test_the_story_by_hand(shell: Shell, tmp_path: Path) -> None:
    assert shell(*PRETRAIN, "--out", "clean").code == 0
    clean = "clean/encoder.safetensors"
    small = ("--count", "16", "--image-size", "16", "--json")
    attack = shell(
        "attack", "toy", clean, *small, "--downstream", "digits:train", "--target", "3", "--out", "bad"
    )
    assert json.loads(attack.out)["target"] == 3
    purify = shell(
        *("purify", "bad/encoder.safetensors", "--defense", "toy", "--images", "digits:train", *small),
        *("--out", "good"),
    )
    assert purify.code == 0
    assert (
        json.loads(purify.out)["encoder"]["fingerprint"]
        == json.loads(attack.out)["result_encoder"]["fingerprint"]
    )
    judged = shell(
        *("evaluate", "good/encoder.safetensors", "--probe", "knn", "--image-size", "16", "--json"),
        *("--trigger", "bad/trigger.json", "--target", "3", "--clean-encoder", clean),
    )
    data = json.loads(judged.out)
    assert judged.code == 0
    assert all(0 <= data[name] <= 1 for name in ("acc", "asr", "asr_all", "clean_acc", "clean_asr"))
    (tmp_path / "good" / "report.html").unlink()
    assert shell("report", "good").out == "good/report.html\n"
    assert (tmp_path / "good" / "report.html").exists()


def test_without_a_trigger_attack_success_is_null(shell: Shell) -> None:
    data = json.loads(shell("evaluate", "suspect.safetensors", "--probe", "knn", "--json").out)
    assert data["asr"] is data["asr_all"] is None
    assert 0 <= data["acc"] <= 1


def test_list_is_a_stable_contract(shell: Shell) -> None:
    known = json.loads(shell("list", "--json").out)
    names = {(entry["family"], entry["name"]) for entry in known}
    assert {("detector", "toy"), ("attack", "toy"), ("defense", "toy"), ("pretrain", "toy")} <= names
    toy = next(entry for entry in known if (entry["family"], entry["name"]) == ("detector", "toy"))
    assert (toy["summary"], toy["paper"]) == ("Says what it is told to.", "nobody, nowhere")
    assert {"year", "needs", "cost", "blind_spots"} <= set(toy)
    assert toy["settings"][0]["name"] == "verdict"
    assert toy["settings"][0]["default"] == "clean"
    assert toy["settings"][0]["doc"] == "The answer."
    words = shell("list").out
    assert "detector toy\n  Says what it is told to." in words
    assert "  cost: fine-tuning\n  does not cover: A backdoor that contrastive training" in words


def test_a_stopped_run_says_how_to_continue(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = json.loads(shell(*PRETRAIN, "--out", "whole", "--json").out)
    train = ToyPretraining.train

    def interrupted(self: ToyPretraining, encoder: Any, images: ImageSet, *, run: Run, **more: Any) -> Any:
        run.stop.requested = True
        return train(self, encoder, images, run=run, **more)

    monkeypatch.setattr(ToyPretraining, "train", interrupted)
    said = shell(*PRETRAIN)
    assert said.code == 130
    assert "--out runs/pretrain-toy --resume" in said.err
    assert "Traceback" not in said.err
    assert read_record(tmp_path / "runs" / "pretrain-toy").status == "interrupted"
    monkeypatch.setattr(ToyPretraining, "train", train)
    resumed = json.loads(shell(*PRETRAIN, "--resume", "--json").out)
    assert resumed["folder"] == "runs/pretrain-toy"
    assert resumed["result_encoder"] == whole["result_encoder"]


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("bug", 2, "Error: An unexpected ZeroDivisionError: a bug; run again with --debug"),
        ("memory", 2, "Error: There is not enough memory"),
        ("stop", 130, "Stopped."),
    ],
)
def test_a_failed_run_is_one_sentence(shell: Shell, fail: str, code: int, message: str) -> None:
    said = shell(*SCAN, "-p", f"fail={fail}", "--json")
    assert said.code == code
    assert said.out == ""
    assert message in said.err
    assert "Traceback" not in said.err


def test_debug_shows_where(shell: Shell) -> None:
    said = shell(*SCAN, "-p", "fail=bug", "--debug")
    assert "Traceback" in said.err
    assert said.err.count("ZeroDivisionError: a bug") == 2


def test_settings_are_names_with_values() -> None:
    assert parse_settings(["a=1", " b = x=y "]) == {"a": "1", "b": "x=y"}
    for wrong, message in (("a", "as NAME=VALUE, found 'a'"), ("=1", "as NAME=VALUE, found '=1'")):
        with pytest.raises(SettingError, match=message):
            parse_settings([wrong])
    with pytest.raises(SettingError, match="'a' was given twice"):
        parse_settings(["a=1", "a=2"])


def test_a_run_is_resumed_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder("x", resume=False) == default_folder("x", resume=True) == Path("runs/x")
    for name, status in (("x", "success"), ("x-2", "interrupted"), ("x-3", "success")):
        Path("runs", name).mkdir(parents=True)
        write_record(ScanRecord(status=status), Path("runs", name))  # type: ignore[arg-type]
    assert default_folder("x", resume=False) == Path("runs/x-4")
    assert default_folder("x", resume=True) == Path("runs/x-2")


def test_what_a_library_prints_does_not_reach_the_json(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    detect = ToyDetector.detect

    def chatty(self: ToyDetector, *arguments: Any, run: Run) -> Any:
        print("chatter")
        return detect(self, *arguments, run=run)

    monkeypatch.setattr(ToyDetector, "detect", chatty)
    said = shell(*SCAN, "--json")
    assert "chatter" in said.err
    assert json.loads(said.out)["verdict"] == "clean"


def test_a_trigger_file_is_read(shell: Shell, tmp_path: Path) -> None:
    save_trigger(Patch(size=3), tmp_path / "t.json")
    said = shell(
        "evaluate", "suspect.safetensors", "--probe", "knn", "--trigger", "t.json", "--target", "1", "--json"
    )
    assert json.loads(said.out)["trigger"]["source"] == "t.json"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom encoderguard.cli import main\n"
        "code = main(['scan', '--help'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(registry.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--detector" in done.stdout
