"""The baseline defenses: their maths by hand, their floor, their refusals, networks without BatchNorm."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from encoderguard.defenses.fine_pruning import FinePruning
from encoderguard.defenses.finetune import FineTune
from encoderguard.defenses.medic import MEDIC, cloning_loss, importance, strength
from encoderguard.defenses.mimic import MIMIC
from encoderguard.defenses.nad import NAD
from encoderguard.defenses.retrain import Retrain
from encoderguard.defenses.ssl_kd import SSLKD, info_nce, regression
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError, ImageError, NonFiniteError, SettingError
from encoderguard.hidden import last_stage_units
from encoderguard.hooks import captured
from encoderguard.images import ImageSet
from encoderguard.losses import attention_loss
from encoderguard.methods import Defense
from encoderguard.pruning import channel_activations
from encoderguard.random import Rng
from encoderguard.repair import begin, pseudo_classes
from encoderguard.run import Run, Stopped, StopSignal
from encoderguard.similarity import neighbour_overlap
from tests.toy_networks import toy_transformer

SHORT: dict[str, Defense] = {
    "finetune": FineTune(epochs=1, batch_size=8, warm_up=1, anchor=1, utility_floor=0),
    "fine_pruning": FinePruning(step=0.25, epochs=1, batch_size=8, warm_up=1, utility_floor=0),
    "nad": NAD(teacher_epochs=1, epochs=1, batch_size=8, warm_up=1, utility_floor=0),
    "medic": MEDIC(epochs=1, batch_size=8, warm_up=1),
    "ssl_kd": SSLKD(teacher_epochs=1, epochs=1, batch_size=8, warm_up=1, utility_floor=0),
    "retrain": Retrain(epochs=1, batch_size=8),
}
each = pytest.mark.parametrize("name", SHORT)


def run() -> Run:
    return Run(rng=Rng(0), precision="float32")


def encoder(seed: int = 0) -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(seed)).eval()


def pictures(count: int = 40) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


# The maths.


def test_attention_summed_or_averaged_over_places() -> None:
    student, teacher = torch.zeros(1, 3, 2, 2), torch.zeros(1, 5, 2, 2)
    student[0, 1, 0, 0], teacher[0, 2, 1, 1] = 3.0, -0.5  # each looks at one place, not at the same
    assert float(attention_loss(student, teacher, reduction="sum")) == pytest.approx(2.0)
    assert float(attention_loss(student, teacher, reduction="mean")) == pytest.approx(2.0 / 4)
    larger = [nn.functional.pad(stage, (0, 6, 0, 6)) for stage in (student, teacher)]
    assert float(attention_loss(*larger, reduction="sum")) == pytest.approx(2.0)
    assert float(attention_loss(*larger, reduction="mean")) == pytest.approx(2.0 / 64)


def test_one_beta_counts_for_all_stages() -> None:
    assert NAD(beta=(0.5,))._weights(4) == [0.5] * 4
    assert NAD(beta=(0.5, 1, 2, 3))._weights(4) == [0.5, 1, 2, 3]
    with pytest.raises(
        SettingError, match="'beta' of defense 'nad' has 3 values, but the encoder has 4 stages"
    ):
        NAD(beta=(1, 2, 3)).purify(encoder(), pictures(), run=run())


def test_strength_is_the_mean_size_relative_to_the_largest_channel() -> None:
    values = torch.zeros(2, 3, 1, 2)
    values[0, 0], values[0, 1] = torch.tensor([-4.0, 4.0]), torch.tensor([0.0, 2.0])
    assert strength(values).tolist() == [[1.0, 0.25, 0.0], [0.0, 0.0, 0.0]]


def test_importance_by_hand() -> None:
    activation, gradient = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    found = importance(activation, gradient, 1.0)
    assert found[0].tolist() == pytest.approx([math.sqrt(0.75 * 0.5), math.sqrt(0.25 * 0.5)])
    assert importance(activation, gradient, 0.0)[0].tolist() == pytest.approx([0.5, 0.5])
    both = importance(activation, activation, 2.0)
    assert both[0].tolist() == pytest.approx([0.9, 0.1])


def test_cloning_by_hand() -> None:
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    teacher[0, 0] = torch.tensor([1.0, 3.0])  # squares over sigma 2: 1/4 and 9/4, mean 5/4
    teacher[0, 1] = torch.tensor([1.0, 1.0])  # over sigma 1/2: 4
    weight, deviation = torch.tensor([[0.4, 0.1]]), torch.tensor([2.0, 0.5])
    assert float(cloning_loss(student, teacher, weight, deviation)) == pytest.approx(0.4 * 1.25 + 0.1 * 4)


def test_info_nce_and_regression_by_hand() -> None:
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert float(info_nce(student, teacher, 0.5)) == pytest.approx(expected)
    assert float(info_nce(student, teacher.flip(0), 0.5)) == pytest.approx(expected + 2)
    assert float(regression(student, teacher)) == pytest.approx(0.0)
    assert float(regression(student, teacher.flip(0))) == pytest.approx(2.0)
    assert float(regression(student, -teacher)) == pytest.approx(4.0)


def test_what_is_captured_is_not_overwritten_later() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)).eval()
    images = torch.rand(2, 3, 4, 4, generator=Rng(0).generator())
    with captured(network, ["1"]) as outputs:
        result = network(images)
    assert torch.equal(outputs["1"], network[1](network[0](images)))
    assert torch.equal(result, outputs["1"].relu())
    assert not network[1]._forward_hooks
    (slope,) = torch.autograd.grad(result.sum(), outputs["1"])
    assert torch.equal(slope, (outputs["1"] > 0).float())


# The methods.


def test_retraining_takes_nothing_but_the_architecture() -> None:
    def result(suspect: Encoder, seed: int) -> str:
        done = SHORT["retrain"].purify(suspect, pictures(), run=Run(rng=Rng(seed)))
        return done.encoder.fingerprint

    one, other = encoder(0), encoder(1)
    assert one.fingerprint != other.fingerprint
    assert result(one, 3) == result(other, 3)
    assert result(one, 3) != result(one, 4)
    assert Retrain().needs


def test_pruned_channels_are_zero_in_the_file_after_fine_tuning(tmp_path: Path) -> None:
    suspect = encoder()
    method = FinePruning(step=0.25, pruning_floor=0, epochs=2, batch_size=8, warm_up=1, utility_floor=0)
    done = method.purify(suspect, pictures(), run=run())
    pruned = done.evidence["pruned"]
    assert {name: len(channels) for name, channels in pruned.items()} == {
        "layer4.0.conv1": 12,
        "layer4.1.conv1": 12,
    }
    loaded = Encoder.load(done.encoder.save(tmp_path / "purified.safetensors"))
    images = torch.rand(4, 3, 8, 8, generator=Rng(2).generator())
    assert torch.equal(loaded(images), done.encoder(images))
    weights = loaded.backbone.state_dict()
    for units in last_stage_units(suspect):
        gone = pruned[units.producer]
        for name in (f"{units.producer}.weight", f"{units.norm}.weight", f"{units.norm}.bias"):
            assert not weights[name][gone].any(), name
        assert channel_activations(loaded, units, pictures(), run())[gone].tolist() == [0.0] * len(gone)
        quiet = channel_activations(suspect, units, pictures(), run())
        assert quiet[gone].max() <= quiet[[c for c in range(16) if c not in gone]].min() + 1e-3


def test_pruning_stops_before_the_floor() -> None:
    done = FinePruning(step=0.1, epochs=1, batch_size=8, warm_up=0, pruning_floor=0.95).purify(
        encoder(), pictures(), run=run()
    )
    *above, last = done.evidence["utility_by_step"]
    assert all(value >= 0.95 for value in above)
    taken = {len(channels) for channels in done.evidence["pruned"].values()}
    if last < 0.95:
        assert taken == {int(0.1 * len(above) * 16 + 1e-9)}
    assert len(above) < 9


@pytest.mark.parametrize("name", ["finetune", "fine_pruning", "nad", "ssl_kd"])
def test_an_absurd_learning_rate_falls_back_and_says_so(name: str) -> None:
    suspect, given = encoder(), {"lr": 1e4, "epochs": 4, "batch_size": 8, "warm_up": 0, "utility_floor": 0.95}
    kinds: dict[str, tuple[type[Defense], dict[str, Any]]] = {
        "finetune": (FineTune, {}),
        "fine_pruning": (FinePruning, {"most": 0.0}),
        "nad": (NAD, {"teacher_epochs": 1}),
        "ssl_kd": (SSLKD, {"teacher_epochs": 1}),
    }
    kind, more = kinds[name]
    done = kind(**(given | more)).purify(suspect, pictures(80), run=run())
    assert done.encoder.fingerprint == suspect.fingerprint
    assert done.evidence["epochs_used"] == 0
    assert "without any of this training" in done.evidence["fallback"]
    if done.history:  # it ended when more than half of the planned epochs were below the floor
        assert len(done.history["utility"]) == 3
        assert "below the floor of 0.95, after 3 of 4 epochs" in done.evidence["fallback"]


@pytest.mark.parametrize("name", ["finetune", "fine_pruning", "nad"])
def test_a_rate_that_breaks_the_encoder_is_divided(name: str) -> None:
    kinds: dict[str, tuple[type[Defense], dict[str, Any]]] = {
        "finetune": (FineTune, {}),
        "fine_pruning": (FinePruning, {"most": 0.0}),
        "nad": (NAD, {"teacher_epochs": 2}),
    }
    kind, more = kinds[name]
    given: dict[str, Any] = {"epochs": 2, "batch_size": 16, "warm_up": 0, "utility_floor": 0.6} | more
    suspect, images = toy_transformer(), pictures(80)  # without BatchNorm small rates change little
    broken = kind(**(given | {"lr": 30.0, "gentler": 0})).purify(suspect, images, run=run())
    assert broken.evidence["fallback"] is not None
    assert (broken.evidence["lr"], broken.evidence["harder"]) == (30.0, [])
    done = kind(**(given | {"lr": 30.0, "gentler": 9})).purify(suspect, images, run=run())
    assert done.evidence["fallback"] is None
    attempts = len(done.evidence["harder"])
    assert attempts > 0
    assert done.evidence["lr"] == pytest.approx(30.0 / 3**attempts)
    assert all("below the floor of 0.6, after 2 of 2 epochs" in reason for reason in done.evidence["harder"])
    assert done.evidence["epochs_used"] == 2
    assert done.encoder.fingerprint != suspect.fingerprint


@pytest.mark.parametrize("stopped_at", [8, 45, 100])
def test_a_run_that_was_stopped_between_rates_ends_as_an_unbroken_one(
    stopped_at: int, tmp_path: Path
) -> None:
    method = FineTune(lr=30.0, gentler=9, epochs=4, batch_size=16, warm_up=1, utility_floor=0.6)
    unbroken = method.purify(toy_transformer(), pictures(80), run=run())
    stop, told = StopSignal(), 0

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        nonlocal told
        told += 1
        stop.requested = told >= stopped_at

    kept = replace(run(), checkpoint=tmp_path / "checkpoint.pt")
    with pytest.raises(Stopped):
        method.purify(toy_transformer(), pictures(80), run=replace(kept, progress=progress, stop=stop))
    resumed = method.purify(toy_transformer(), pictures(80), run=replace(kept, resume=True))
    assert resumed.encoder.fingerprint == unbroken.encoder.fingerprint
    assert resumed.evidence == unbroken.evidence
    assert resumed.history == unbroken.history


def test_the_utility_in_the_evidence_is_that_of_the_encoder() -> None:
    suspect, images = encoder(), pictures(80)
    done = FineTune(epochs=3, batch_size=16, warm_up=1, lr=0.05, utility_floor=0).purify(
        suspect, images, run=run()
    )
    held_out = images.subset(run().rng.permutation(80, "held out")[:16]).take(range(16)).float() / 255
    with torch.no_grad():
        expected = neighbour_overlap(done.encoder(held_out), suspect(held_out), 3)
    assert done.evidence["utility_after"] == pytest.approx(expected, abs=1e-6)  # rounded there
    assert done.evidence["utility_after"] == pytest.approx(done.history["utility"][-1], abs=1e-6)
    assert (done.evidence["held_out"], done.evidence["epochs_used"]) == (16, 3)
    assert done.evidence["fallback"] is None


@each
def test_networks_without_batch_norm(name: str) -> None:
    suspect = toy_transformer()
    before = suspect.fingerprint
    done = SHORT[name].purify(suspect, pictures(), run=run())
    assert suspect.fingerprint == before
    assert done.encoder.fingerprint != before
    assert bool(done.encoder(torch.rand(2, 3, 8, 8)).isfinite().all())
    json.dumps(done.evidence, allow_nan=False)
    assert done.evidence["utility_after"] >= 0


@each
def test_too_few_images_and_damaged_encoders(name: str) -> None:
    method, suspect = SHORT[name], encoder()
    with pytest.raises(
        ImageError,
        match="in batches of 8, with a fifth held out, needs at least 24 images, but noise holds 20",
    ):
        method.purify(suspect, pictures(20), run=run())
    constant, broken = encoder(), encoder()
    with torch.no_grad():
        for part in constant.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.zero_()
                part.bias.fill_(1.0)
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(EncoderError, match="gives the same features for all 12 images held out of noise"):
        method.purify(constant, pictures(), run=run())
    with pytest.raises(NonFiniteError, match=r"The features of 12 of 12 images of noise.* are not finite"):
        method.purify(broken, pictures(), run=run())


@pytest.mark.parametrize("method", [MIMIC(batch_size=8), SHORT["nad"], SHORT["ssl_kd"]])
def test_an_encoder_without_stages_is_refused_where_stages_are_compared(method: Defense) -> None:
    bare = Encoder.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), taps=[])
    with pytest.raises(EncoderError, match=r"compares the stages of encoders, and this one has none; name"):
        method.purify(bare, pictures(), run=run())


def test_features_that_are_not_finite_pass_no_gate() -> None:
    gate = begin(encoder(), pictures(), batch_size=8, floor=0.0, purpose="A test", run=run()).gate
    broken = encoder()
    nn.init.constant_(broken.backbone.get_parameter("conv1.weight"), float("nan"))
    assert gate.measure(broken) < gate.floor


def test_clusters_need_as_many_different_images() -> None:
    with pytest.raises(ImageError, match=r"3 clusters need as many different images, .* tells only 2"):
        pseudo_classes(torch.eye(2).repeat(4, 1), 3, Rng(0))
