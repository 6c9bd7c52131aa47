from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoderguard import jobs
from encoderguard.bundles import read_provenance
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.jobs.pictures import planar
from encoderguard.methods import Reference
from encoderguard.results import EncoderFacts, read_record
from encoderguard.triggers import MaskedPattern, Patch, load_trigger
from tests.toys import ToyAttack, ToyDefense, ToyDetector, ToyPretraining, toy_encoder, toy_images

CPU: Any = {"device": "cpu", "precision": "float32"}
TOY = ToyDetector()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_scan_leaves_record_report_trigger_and_arrays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scan"
    record, detection = jobs.scan(
        toy_encoder(), toy_images(), detector=ToyDetector(score=0.125), out=out, **CPU
    )
    assert files(out) == {"result.json", "report.html", "recovered-trigger.json", "arrays.npz"}
    assert read_record(out) == record
    assert (record.verdict, record.score, record.threshold, record.detector) == ("clean", 0.125, 0.25, "toy")
    assert record.settings == {"verdict": "clean", "score": 0.125, "fail": ""}
    assert record.settings_passed == {"score": 0.125}
    assert set(record.outputs) == {"recovered-trigger.json", "arrays.npz"}
    found = load_trigger(out / "recovered-trigger.json")
    assert isinstance(found, MaskedPattern)
    assert isinstance(detection.trigger, MaskedPattern)
    assert torch.equal(found.mask, detection.trigger.mask)
    assert "behavioural indicator" in (out / "report.html").read_text()


def test_the_arrays_are_what_the_report_draws(tmp_path: Path) -> None:
    images = toy_images(20)
    jobs.scan(toy_encoder(), images, detector=TOY, out=tmp_path, **CPU)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as held:
        arrays = dict(held)
    shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    assert shapes == {
        "images": ((8, 16, 16, 3), "uint8"),
        "stamped": ((8, 16, 16, 3), "uint8"),
        "mask": ((16, 16), "float32"),
        "pattern": ((16, 16, 3), "float32"),
        "embedding": ((20, 2), "float32"),
        "embedding_triggered": ((20, 2), "float32"),
    }
    assert (arrays["stamped"][:, :2] == 255).all()
    assert (arrays["stamped"][:, 2:] == arrays["images"][:, 2:]).all()


def test_provenance_is_complete(tmp_path: Path) -> None:
    record, _ = jobs.scan(toy_encoder(), toy_images(), detector=TOY, seed=3, out=tmp_path, **CPU)
    assert record.encoder is not None
    assert record.encoder.fingerprint == toy_encoder().fingerprint
    assert record.images is not None
    assert (record.images.name, record.images.count, record.images.available) == ("noise", 32, 32)
    assert (record.seed, record.device, record.precision, record.status) == (3, "cpu", "float32", "success")
    assert record.seconds is not None
    assert record.method_seconds is not None
    assert record.seconds >= record.method_seconds >= 0
    assert record.versions["torch"] == torch.__version__


def test_count_draws_with_the_seed_and_says_when_there_are_too_few() -> None:
    def digest(seed: int, count: int | None) -> tuple[str, int, list[str]]:
        record, _ = jobs.scan(toy_encoder(), toy_images(), detector=TOY, seed=seed, count=count, **CPU)
        assert record.images is not None
        return record.images.digest, record.images.count, record.warnings

    assert digest(0, 12) == digest(0, 12)
    assert digest(0, 12)[0] != digest(1, 12)[0]
    assert digest(0, 12)[1] == 12
    assert "noise holds 32 images where 40 were asked for; all of them are used." in digest(0, 40)[2]
    assert "noise holds 32 images where 1000 are usual; all of them are used." in digest(0, None)[2]
    with pytest.raises(SettingError, match="at least 1, found 0"):
        digest(0, 0)


def test_pretraining_writes_an_encoder_that_loads(tmp_path: Path) -> None:
    result = jobs.pretrain(toy_images(), method=ToyPretraining(), width=2, out=tmp_path, **CPU)
    loaded = Encoder.load(tmp_path / "encoder.safetensors")
    assert result.record.result_encoder is not None
    assert loaded.fingerprint == result.encoder.fingerprint == result.record.result_encoder.fingerprint
    assert read_provenance(tmp_path / "encoder.safetensors")["method"] == "toy"
    assert len(result.record.history["loss"]) == 2
    assert files(tmp_path) == {"result.json", "report.html", "encoder.safetensors", "arrays.npz"}
    assert (
        result.encoder.fingerprint
        == jobs.pretrain(toy_images(), method=ToyPretraining(), width=2, **CPU)[1].fingerprint
    )


def test_an_attack_records_its_reference_and_trigger(tmp_path: Path) -> None:
    reference = Reference(image=toy_images().take([0])[0], label=1)
    result = jobs.attack(
        toy_encoder(), toy_images(), method=ToyAttack(), references=[reference], out=tmp_path, **CPU
    )
    assert result.record.target == 1
    assert result.record.references[0]["source"] == "in memory"
    assert result.record.evidence == {"looked": 1}
    assert load_trigger(tmp_path / "trigger.json") == Patch(size=4)


def test_an_attack_chooses_its_reference_among_downstream_images() -> None:
    result = jobs.attack(
        toy_encoder(), toy_images(), method=ToyAttack(), downstream=toy_images(labelled=True), target=1, **CPU
    )
    assert result.references[0].label == 1
    assert {"reference_index", "reference_confidence", "looked"} <= set(result.record.evidence)
    assert result.record.downstream is not None
    assert result.record.downstream.labelled


def test_an_attack_takes_a_reference_one_way() -> None:
    wrongs: list[Any] = [
        {},
        {"references": [Reference(image=toy_images().take([0])[0])], "downstream": toy_images()},
    ]
    for wrong in wrongs:
        with pytest.raises(SettingError, match="either --reference, or --downstream with --target"):
            jobs.attack(toy_encoder(), toy_images(), method=ToyAttack(), **wrong, **CPU)
    with pytest.raises(SettingError, match="--downstream needs --target"):
        jobs.attack(
            toy_encoder(), toy_images(), method=ToyAttack(), downstream=toy_images(labelled=True), **CPU
        )


def test_a_purified_encoder_is_compared_on_images_it_has_not_seen(tmp_path: Path) -> None:
    suspect = toy_encoder()
    before = suspect.fingerprint
    result = jobs.purify(suspect, toy_images(96), defense=ToyDefense(), count=32, out=tmp_path, **CPU)
    assert suspect.fingerprint == before
    assert result.record.fidelity["source"] == "images not used to purify"
    assert result.record.fidelity["n"] == 64
    assert result.record.nonfinite == {"evidence.beta.1": "nan"}
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["embedding_before"].shape == arrays["embedding_after"].shape == (32, 2)


def test_fidelity_says_when_it_saw_the_same_images() -> None:
    seen = jobs.purify(toy_encoder(), toy_images(64), defense=ToyDefense(), **CPU).record.fidelity
    few = jobs.purify(toy_encoder(), toy_images(20), defense=ToyDefense(), **CPU).record.fidelity
    assert "there were no others" in str(seen["source"])
    assert "not measured" in str(few["source"])


def test_an_evaluation_without_a_trigger_has_no_attack_success(tmp_path: Path) -> None:
    images = toy_images(40, labelled=True)
    record, found = jobs.evaluate(toy_encoder(), images, images, probe="knn", out=tmp_path, **CPU)
    assert record.acc == found.acc.mean
    assert record.asr is record.asr_all is record.clean_asr is None
    assert record.counts == {"train": 40, "test": 40, "target": None}


def test_an_evaluation_with_a_trigger_has_intervals_and_the_clean_floor(tmp_path: Path) -> None:
    images = toy_images(40, labelled=True)
    clean = toy_encoder(1)
    record, _ = jobs.evaluate(
        toy_encoder(),
        images,
        images,
        trigger=Patch(size=4),
        target=1,
        clean_encoder=clean,
        probe="knn",
        out=tmp_path,
        **CPU,
    )
    assert None not in (record.asr, record.asr_all, record.clean_acc, record.clean_asr, record.clean_asr_all)
    assert set(record.intervals) == {"acc", "asr", "asr_all", "clean_acc", "clean_asr", "clean_asr_all"}
    assert isinstance(record.clean_encoder, EncoderFacts)
    assert record.clean_encoder.fingerprint == clean.fingerprint
    assert (record.target, record.target_name) == (1, "odd")
    assert record.trigger is not None
    assert record.trigger["kind"] == "patch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "Unknown option 'colour'"),
        ({"precision": "fp8"}, "must be auto, bf16 or float32, found 'fp8'"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"settings": {"score": 1}}, "Settings go with a method's name"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        jobs.scan(toy_encoder(), toy_images(), detector=TOY, **options)


def test_a_constant_encoder_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    dead = toy_encoder()
    for parameter in dead.parameters():
        parameter.data.zero_()
    record, _ = jobs.scan(dead, toy_images(), detector=TOY, **CPU)
    assert len(record.warnings) > 1  # one is about the number of images
    assert record.warnings[1] in caplog.text


def test_images_can_be_objects_or_specs() -> None:
    by_spec = jobs.scan(toy_encoder(), "digits:test", detector=TOY, count=16, image_size=16, **CPU).record
    assert by_spec.images is not None
    assert (by_spec.images.spec, by_spec.images.height, by_spec.images.count) == ("digits:test", 16, 16)
    assert isinstance(toy_images(), ImageSet)


def test_planar_maps_keep_the_largest_spread_and_a_fixed_direction() -> None:
    line = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.8, 0.6]])
    whole = planar([line])[0]
    split = planar([line[:1], line[1:]])
    assert np.allclose(whole, np.concatenate(split))
    assert whole[:, 0].var() > whole[:, 1].var() > 0
    assert np.allclose(planar([torch.ones(3, 1)])[0], 0)
