"""The main job, kept small: every step runs, every number of the record comes from a step's own record."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from encoderguard.demo import run_demo
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet, load_images
from encoderguard.information import Measure, layer_profile
from encoderguard.random import Rng
from encoderguard.recipes import RECIPES, recipe_named
from encoderguard.references import choose_reference
from encoderguard.registry import create
from encoderguard.results import DemoRecord, read_record
from encoderguard.run import Run
from encoderguard.triggers import Patch

TINY = recipe_named("digits").model_copy(
    update={
        "width": 2,
        "pretrain": {"epochs": 1, "batch_size": 32},
        "pretrain_count": 64,
        "attack": {"epochs": 1, "batch_size": 32, "trigger_size": 8},
        "shadow_count": 64,
        "scan": {"max_steps": 4, "batch_size": 32},
        "scan_count": 64,
        "purify": {"epochs": 1, "batch_size": 32},
        "purify_count": 64,
    }
)


def test_every_recipe_names_real_settings() -> None:
    for recipe in RECIPES.values():
        create("pretrain", "simclr", recipe.pretrain)
        create("attack", "badencoder", recipe.attack)
        create("detector", "decree", recipe.scan)
        create("defense", "mimic", recipe.purify)
    with pytest.raises(
        SettingError, match="Unknown recipe 'imagenet'; expected one of: digits, cifar10, paper"
    ):
        recipe_named("imagenet")


def test_the_story_and_its_resumption(tmp_path: Path) -> None:
    first = run_demo(out=tmp_path / "demo", recipe=TINY, seed=3)
    record = read_record(tmp_path / "demo")
    assert isinstance(record, DemoRecord)
    assert record == first
    judged = read_record(tmp_path / "demo/seed-3/evaluate-backdoored").model_dump()
    assert record.backdoored["acc"] == judged["acc"]
    assert record.clean["asr"] == judged["clean_asr"]
    purified = read_record(tmp_path / "demo/seed-3/evaluate-purified").model_dump()
    assert record.purified["asr_all"] == purified["asr_all"]
    assert record.purified["asr_seeds"] == [purified["asr"]]
    assert [profile["measure"] for profile in record.profiles] == ["mine", "cka"]
    assert (tmp_path / "demo/report.html").read_text().count("<img") > 3
    # a resumed demo keeps every finished step and ends with the same numbers
    again = run_demo(out=tmp_path / "demo", recipe=TINY, seed=3, resume=True)
    assert (again.clean, again.backdoored, again.purified) == (first.clean, first.backdoored, first.purified)
    assert again.runs[0]["seconds"] == first.runs[0]["seconds"]
    with pytest.raises(SettingError, match="its target was 0, now it is 5"):
        run_demo(out=tmp_path / "demo", recipe=TINY, seed=3, target=5, resume=True)
    with pytest.raises(SettingError, match="its seed was 3, now it is 4"):
        run_demo(out=tmp_path / "demo", recipe=TINY, seed=4, resume=True)
    assert read_record(tmp_path / "demo") == again


def test_a_killed_run_resumes_to_the_same_encoder(tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "encoderguard",
            "pretrain",
            "simclr",
            "--images",
            "digits:train",
            "--count",
            "64",
        ),
        *("--width", "2", "-p", "epochs=15", "-p", "batch_size=16"),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    environment["ENCODERGUARD_SAVE_EVERY"] = "0"

    log = tmp_path / "log"

    def run(out: Path, *more: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as stream:
            return subprocess.Popen([*command, "--out", str(out), *more], env=environment, stderr=stream)

    whole = run(tmp_path / "whole")
    assert whole.wait(300) == 0, log.read_text()
    killed = run(tmp_path / "killed")
    checkpoint = tmp_path / "killed/checkpoint.pt"
    for _ in range(1000):
        if checkpoint.exists() or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    resumed = run(tmp_path / "killed", "--resume")
    assert resumed.wait(300) == 0, log.read_text()
    fingerprints = [
        Encoder.load(tmp_path / name / "encoder.safetensors").fingerprint for name in ("whole", "killed")
    ]
    assert fingerprints[0] == fingerprints[1]


def encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0)).eval()


def test_the_reference_is_the_candidate_the_probe_is_surest_of() -> None:
    candidates = load_images("digits:train", labels=True).subset(range(200))
    reference, evidence = choose_reference(encoder(), candidates, 3, run=Run(rng=Rng(0)))
    assert candidates.labels is not None
    assert int(candidates.labels[evidence["reference_index"]]) == 3
    assert torch.equal(reference.image, candidates.take([evidence["reference_index"]])[0])
    assert evidence["reference_confidence"] >= evidence["median_candidate_confidence"]
    with pytest.raises(SettingError, match="has the target label 12"):
        choose_reference(encoder(), candidates, 12, run=Run(rng=Rng(0)))


@pytest.mark.parametrize("measure", ["cka", "gaussian", "mine"])
def test_a_profile_stands_out_of_its_shuffled_pairs(measure: Measure) -> None:
    pixels = load_images("digits:train").take(range(300)).float() / 255
    profile = layer_profile(encoder(), pixels, measure=measure, run=Run(rng=Rng(0)), epochs=10)
    assert [stage.tap for stage in profile.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert profile.stages[-1].held_out > profile.stages[-1].null + 3 * profile.stages[-1].null_spread
    triggered = layer_profile(
        encoder(),
        pixels,
        measure=measure,
        run=Run(rng=Rng(0)),
        epochs=10,
        trigger=Patch(size=8),
    )
    assert triggered != profile


def test_triggered_features_differ() -> None:
    images = ImageSet.from_arrays(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    run = Run(rng=Rng(0))
    assert not torch.equal(
        extract(encoder(), images, run=run), extract(encoder(), images, run=run, trigger=Patch())
    )
