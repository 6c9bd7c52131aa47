"""What every registered method must do, whatever it is."""

import json

import pytest
import torch

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import (
    DataPoisoning,
    Defense,
    Detection,
    Detector,
    EncoderAttack,
    Filter,
    Poisoned,
    Pretraining,
    Ranking,
    Reference,
)
from encoderguard.random import Rng
from encoderguard.registry import FAMILIES, Family, Method, create, method_class, method_names, setting_docs
from encoderguard.run import Run

ALL = [(family, name) for family in FAMILIES for name in method_names(family)]
SHORT: dict[str, dict[str, object]] = {
    "simclr": {"epochs": 1, "batch_size": 8},
    "moco": {"epochs": 1, "batch_size": 8},
    "byol": {"epochs": 1, "batch_size": 8, "hidden_dim": 16, "projection_dim": 8},
    "simsiam": {"epochs": 1, "batch_size": 8, "hidden_dim": 16, "predictor_dim": 8},
    "supervised": {"epochs": 1, "batch_size": 8},
    "clip": {"epochs": 1, "batch_size": 8, "text_width": 16, "vocabulary": 64},
    "adaptive_decree": {"epochs": 1, "batch_size": 8, "trigger_size": 3, "reference_views": 2},
    "adaptive_mimic": {"epochs": 1, "batch_size": 8, "trigger_size": 3, "reference_views": 2},
    "adaptive_search": {"epochs": 1, "batch_size": 8, "trigger_size": 3, "reference_views": 2},
    "badencoder": {"epochs": 1, "batch_size": 8, "trigger_size": 3, "reference_views": 2},
    "drupe": {"epochs": 1, "batch_size": 8, "trigger_size": 3, "reference_views": 2},
    "transtroj": {"epochs": 1, "batch_size": 8, "trigger_epochs": 1},
    "ssl_backdoor": {"patch_size": 3},
    "ctrl": {"rate": 0.1, "window": 8, "coefficients": ((3, 3), (7, 7))},
    "corrupt_encoder": {"rate": 0.2, "patch_size": 3, "support_share": 0.4},
    "poisoned_encoder": {"rate": 0.1, "patch_size": 3},
    "noisy_alignment": {"rate": 0.1, "patch_size": 2},
    "text_on_pair": {"rate": 0.1, "patch_size": 3},
    "badnets": {},
    "blend": {},
    "trigger_search": {"images": 8, "scale": 0.02, "keep": 1, "starts": 2, "steps": 1, "tune_steps": 1},
    "decree": {"max_steps": 6, "batch_size": 8},
    "abs": {"levels": (2.0,), "scan_images": 4, "channels": 2, "steps": 2, "batch_size": 4, "clusters": 3},
    "ssl_cleanse": {"clusters": 3, "steps": 2, "batch_size": 4},
    "patch_search": {"clusters": 4, "paste_on": 4, "models": 1, "steps": 2, "window": 0.5},
    "mimic": {"epochs": 1, "batch_size": 8},
    "ssl_defender": {
        "recovery": "generators",
        "epochs": 1,
        "batch_size": 8,
        "generators": 2,
        "recovery_steps": 2,
        "recovery_batch": 8,
    },
    "finetune": {"epochs": 1, "batch_size": 8, "warm_up": 1},
    "fine_pruning": {"step": 0.25, "epochs": 1, "batch_size": 8, "warm_up": 1},
    "nad": {"teacher_epochs": 1, "epochs": 1, "batch_size": 8, "warm_up": 1},
    "medic": {"epochs": 1, "batch_size": 8, "warm_up": 1},
    "anp": {"steps": 2, "batch_size": 8, "lr": 5, "threshold_step": 0.3},
    "moth": {
        "clusters": 3,
        "rounds": 1,
        "warm_up_steps": 1,
        "steps": 1,
        "search_steps": 2,
        "pair_steps": 2,
        "search_batch": 4,
        "batch_size": 8,
        "success": 0.1,
        "largest": 1,
    },
    "decree_unlearn": {
        "feature_space": "standardised",
        "beta": 0.1,
        "restarts": 1,
        "search_steps": 4,
        "search_batch": 8,
        "epochs": 1,
        "batch_size": 8,
        "lr": 1e-3,
    },
    "defense neural_cleanse": {
        "objective": "universal",
        "feature_space": "standardised",
        "beta": 0.1,
        "restarts": 1,
        "search_steps": 4,
        "search_batch": 8,
        "form": "prune",
        "prune_step": 0.25,
        "batch_size": 8,
        "utility_floor": 0,
    },
    "detector neural_cleanse": {"clusters": 3, "steps": 2, "batch_size": 4},
    "ssl_kd": {"teacher_epochs": 1, "epochs": 1, "batch_size": 8, "warm_up": 1},
    "retrain": {"epochs": 1, "batch_size": 8},
}
"""Settings that keep a method short; a new method adds its own, with its family if two share the name."""


def encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(0)).eval()


def images() -> ImageSet:
    pixels = torch.randint(0, 256, (32, 3, 8, 8), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def labelled() -> ImageSet:
    names = ("ash", "birch", "cedar", "dogwood")
    return ImageSet.from_arrays(images().take(range(32)), torch.arange(32) % 4, names, name="labelled noise")


def outcome(method: Method, subject: Encoder, seed: int) -> Encoder | Detection | Poisoned | Ranking:
    run = Run(rng=Rng(seed))
    if isinstance(method, Pretraining):
        trained_on = labelled() if method.needs_labels else images()
        return method.train(subject, trained_on, run=run).encoder
    if isinstance(method, EncoderAttack):
        return method.plant(subject, images(), [Reference(image=images().take([0])[0])], run=run).encoder
    if isinstance(method, Defense):
        return method.purify(subject, images(), run=run).encoder
    if isinstance(method, DataPoisoning):
        return method.poison(labelled(), 1, run=run)
    if isinstance(method, Filter):
        return method.rank(subject, images(), run=run)
    assert isinstance(method, Detector)
    return method.detect(subject, images(), run=run)


def comparable(result: Encoder | Detection | Poisoned | Ranking) -> object:
    if isinstance(result, Encoder):
        return result.fingerprint
    if isinstance(result, Poisoned):
        return (result.images.digest, result.trigger.to_dict(), result.indices.tolist(), result.manifest)
    if isinstance(result, Ranking):
        return (result.scores.tolist(), result.evidence)
    return (result.verdict, result.score, result.threshold)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_same_seed_same_result_and_nothing_else_changes(family: Family, name: str) -> None:
    subject = encoder()
    before, state = subject.fingerprint, torch.random.get_rng_state()
    method = create(family, name, SHORT.get(f"{family} {name}") or SHORT[name])
    first = outcome(method, subject, 7)
    assert subject.fingerprint == before
    assert not subject.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert comparable(outcome(method, subject, 7)) == comparable(first)
    if isinstance(first, Encoder):
        assert not first.training
        assert bool(first(torch.rand(2, 3, 8, 8)).isfinite().all())
    elif isinstance(first, Poisoned):
        assert len(first.indices)
        assert first.images.take([0]).dtype == torch.uint8
        json.dumps(first.manifest, allow_nan=False)
    elif isinstance(first, Ranking):
        assert first.scores.shape == (32,)
        json.dumps(first.evidence, allow_nan=False)
    else:
        assert 0 <= first.score < float("inf")  # a share, a size or an outlier index
        json.dumps(first.evidence, allow_nan=False)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_settings_are_documented_and_checked(family: Family, name: str) -> None:
    method = create(family, name)
    again = create(family, name, method.settings())
    assert again == method
    assert json.loads(json.dumps(method.settings())) == method.settings()
    for setting in setting_docs(method_class(family, name)):
        assert setting["doc"].endswith("."), f"{name}.{setting['name']} needs a docstring"
    with pytest.raises(
        SettingError, match=f"Unknown setting 'colour' of {family} '{name}'; expected one of: "
    ):
        create(family, name, {"colour": 1})


def test_settings_come_as_text_from_the_command_line() -> None:
    method = create(
        "detector", "decree", {"restarts": "5", "tau": ".2", "calibrated": "false", "clean_scores": "[.1,.2]"}
    )
    assert (method.restarts, method.tau, method.calibrated, method.clean_scores) == (
        5,
        0.2,
        False,
        (0.1, 0.2),
    )
    with pytest.raises(
        SettingError, match="Setting 'restarts' of detector 'decree' cannot be 'many': input should be"
    ):
        create("detector", "decree", {"restarts": "many"})
    for value in ("inf", "nan"):
        with pytest.raises(SettingError, match="should be a finite number"):
            create("defense", "mimic", {"lr": value})
    with pytest.raises(SettingError, match="Unknown detector 'oracle'; expected one of: abs, decree, "):
        create("detector", "oracle")


@pytest.mark.parametrize(("family", "name"), ALL)
def test_a_defender_has_no_way_to_be_told_the_truth(family: Family, name: str) -> None:
    import inspect

    calls = {"detector": "detect", "defense": "purify", "filter": "rank"}
    if call := calls.get(family):
        assert set(inspect.signature(getattr(method_class(family, name), call)).parameters) == {
            "self",
            "encoder",
            "images",
            "run",
        }
        words = {setting["name"] for setting in setting_docs(method_class(family, name))}
        assert not words & {"trigger", "target", "label", "labels", "backdoored", "is_backdoored"}


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_method_says_what_it_needs_costs_and_does_not_cover(family: Family, name: str) -> None:
    cls = method_class(family, name)
    assert all(text.strip() for text in (cls.paper, cls.needs, cls.cost, cls.blind_spots))
    assert cls.year == 0 or 1990 < cls.year < 2100, "the paper's year, or 0 for a method of our own"
