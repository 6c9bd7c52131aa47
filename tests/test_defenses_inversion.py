"""Defenses and the detector that rest on masks and on found triggers: maths by hand, floors, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from encoderguard.defenses.anp import ANP, ascended, gains, largest_threshold, scaled, without
from encoderguard.defenses.decree_unlearn import DecreeUnlearn
from encoderguard.defenses.moth import MOTH, choose_pair, small_enough
from encoderguard.defenses.neural_cleanse import NeuralCleanse, left_over, suspects, without_most_raised
from encoderguard.detectors.neural_cleanse import NeuralCleanse as Detect
from encoderguard.detectors.neural_cleanse import anomaly_index
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError, ImageError, SettingError
from encoderguard.feature_heads import centroid_head, linear_head
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Defense
from encoderguard.random import Rng
from encoderguard.repair import PseudoClasses, begin
from encoderguard.run import Run
from encoderguard.smallest import (
    AnswerPlan,
    CollapsePlan,
    Smallest,
    answer_loss,
    random_stamp,
    smallest_collapse,
    smallest_per_answer,
)
from encoderguard.training import Plan
from encoderguard.triggers import MaskedPattern
from encoderguard.unlearning import FORGET, unlearn
from tests.toy_networks import toy_transformer


def run() -> Run:
    return Run(rng=Rng(0), precision="float32")


def encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(0)).eval()


def pictures(count: int = 40, high: int = 256) -> ImageSet:
    pixels = torch.randint(0, high, (count, 3, 8, 8), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def square(value: float = 1.0, side: int = 4) -> MaskedPattern:
    mask = torch.zeros(8, 8)
    mask[:side, :side] = 1
    return MaskedPattern(mask, torch.full((3, 8, 8), value))


class Quadrants(nn.Module):
    """Features are the mean colour of the left and of the right half: whoever stamps them decides them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(x.mean(1, keepdim=True)).flatten(1)
        return out


def halves() -> Encoder:
    return Encoder.wrap(Quadrants(), taps=["pool"], name="halves").eval()


# Anomaly index.


def test_anomaly_index_by_hand() -> None:
    # median 10, absolute deviations 8 2 1 1 0 1 1 2 3: their median is 1
    sizes = [2.0, 8, 9, 9, 10, 11, 11, 12, 13]
    assert anomaly_index(sizes) == pytest.approx(8 / 1.4826)
    assert anomaly_index([*sizes[1:], 100.0]) < 3, "a large mask is no sign of a backdoor"
    assert anomaly_index([0.1]) == 0


def test_which_clusters_are_acted_on() -> None:
    sizes: list[float | None] = [8.0, 9, 9, None, 2, 10, 11, 11, 12, 13]
    assert suspects(sizes, 2.0) == [4]
    assert suspects([0.3, 0.2, None], 2.0) == [1], "few sizes: the smallest"
    assert suspects([5.0, 6, 7, 8, 9, 10, 11, 12], 2.0) == [0], "no outlier: the smallest"
    assert suspects([None, None], 2.0) == []


def test_fewer_than_eight_sizes_carry_no_verdict() -> None:
    assert Detect()._judge(50.0, 7, 10)[0] == "inconclusive"
    assert Detect()._judge(2.1, 8, 10)[0] == "backdoored"
    assert Detect()._judge(2.0, 10, 10)[0] == "clean"


# Searches.


def test_the_value_is_the_share_missed_and_the_gradient_that_of_the_cross_entropy() -> None:
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], requires_grad=True)  # one start, two images
    value = answer_loss(lambda z: z, [0])(scores)
    assert value.tolist() == [0.5]
    value.sum().backward()  # type: ignore[no-untyped-call]
    wanted = (scores.detach().softmax(-1) - torch.tensor([1.0, 0.0])) / 2
    assert scores.grad is not None
    assert torch.allclose(scores.grad, wanted)


def test_centroids_answer_with_the_nearest_cluster() -> None:
    clean = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    head = centroid_head(clean, PseudoClasses(torch.tensor([0, 0, 1, 1]), torch.zeros(2, 2)))
    assert head(torch.tensor([[[0.5, 1.2]], [[3.0, 0.9]]])).argmax(-1).tolist() == [[0], [1]]
    assert float(head(torch.tensor([4.0, 1.0]))[1]) == pytest.approx(10.0)  # cosine 1 over 0.1


def test_a_linear_head_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([0.0, 0.5, 3.0])
    save_file({"weight": weight, "bias": bias}, path)
    head, count = linear_head(path, 2, torch.device("cpu"))
    assert count == 3
    assert head(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 4.5, 3.0]]
    with pytest.raises(SettingError, match=r"must hold weight \[K, 7\] and bias \[K\] for this encoder"):
        linear_head(path, 7, torch.device("cpu"))
    with pytest.raises(SettingError, match="cannot be read"):
        linear_head(tmp_path / "none.safetensors", 2, torch.device("cpu"))


def test_the_search_finds_the_half_that_decides() -> None:
    """The answer is 1 where the right half is bright: the smallest mask lies there and is verified."""

    def head(features: Tensor) -> Tensor:
        return torch.stack([torch.full_like(features[..., 1], 0.5), features[..., 1]], -1) * 20

    plan = AnswerPlan(success=0.95, steps=60, batch_size=16, learning_rate=0.3)
    (found,) = smallest_per_answer(halves(), pictures(high=100), head, [1], plan, run=run())
    assert found.trigger is not None
    assert found.value is not None
    assert found.value >= 0.95
    mask = found.trigger.mask
    assert float(mask[:, 4:].mean()) > 3 * float(mask[:, :4].mean())


def test_a_collapse_is_verified_and_pointless_searches_are_refused() -> None:
    plan = CollapsePlan(beta=0.9, restarts=2, steps=40, batch_size=16, standardised=True)
    found = smallest_collapse(halves(), pictures(), plan, run=run())
    assert found.trigger is not None
    stamped = extract(halves(), pictures(), run=run(), trigger=found.trigger)
    assert found.effect(stamped) == pytest.approx(found.value)
    assert found.value is not None
    assert found.value >= 0.9
    raw = CollapsePlan(beta=0.9, restarts=1, steps=1, batch_size=16, standardised=False)
    with pytest.raises(
        SettingError, match=r"mean cosine of 0.9\d\d, above beta 0.9.*take feature_space=standardised"
    ):
        smallest_collapse(halves(), pictures(), raw, run=run())


def test_a_share_of_the_images_is_stamped_with_one_of_the_triggers() -> None:
    images = torch.full((400, 3, 8, 8), 0.5)
    stamp = random_stamp([square(1.0), square(0.0)], 0.5)
    corner = stamp(images, Rng(0).generator())[:, 0, 0, 0]
    counts = [int((corner == value).sum()) for value in (0.0, 0.5, 1.0)]
    assert sum(counts) == 400
    assert 160 < counts[1] < 240
    assert min(counts) > 60
    assert float(images.min()) == 0.5, "the batch itself is unchanged"
    assert bool((random_stamp([square(1.0)])(images, Rng(0).generator())[:, 0, 0, 0] == 1).all())


def test_unlearning_draws_stamped_images_to_their_clean_features() -> None:
    subject = encoder()
    repair = begin(subject, pictures(), batch_size=8, floor=0.0, purpose="It", run=run())

    def cosine(to: Encoder) -> float:
        stamped = extract(to, repair.images, run=run(), trigger=square())
        clean = extract(subject, repair.images, run=run())
        return float(torch.cosine_similarity(stamped, clean, dim=1).mean())

    plan = Plan(epochs=3, batch_size=8, lr=1e-2, optimizer="sgd")
    done = unlearn(
        repair.suspect,
        repair.suspect,
        random_stamp([square()]),
        repair,
        loss=FORGET,
        plan=plan,
        views=False,
        run=run(),
    )
    assert set(done.history) == {"paired", "loss", "utility"}
    assert done.history["loss"][-1] < done.history["loss"][0]
    assert cosine(done.encoder) > cosine(subject) + 0.01


# ANP.


def test_the_largest_threshold_above_the_floor() -> None:
    thresholds = [0.0, 0.05, 0.1, 0.15]
    assert largest_threshold(thresholds, [1.0, 0.9, 0.8, 0.7], 0.8) == 0.1
    assert largest_threshold(thresholds, [1.0, 0.7, 0.85, 0.7], 0.8) == 0.1
    assert largest_threshold(thresholds, [0.7, 0.6, 0.5, 0.1], 0.8) is None
    assert ANP()._thresholds()[:3] == [0.0, 0.05, 0.1]
    assert ANP()._thresholds()[-1] == 0.9


def test_the_perturbation_goes_up_the_sign_and_stays_inside() -> None:
    noise, slope = torch.tensor([0.3, -0.3, 0.1]), torch.tensor([5.0, 0.01, 0.0])
    assert ascended(noise, slope, 0.4).tolist() == pytest.approx([0.4, 0.1, 0.1])


def test_scales_and_shifts_are_multiplied_per_channel() -> None:
    subject = encoder()
    layers = gains(subject)
    assert all(layer.weight.startswith("backbone.") for layer in layers)
    count = sum(layer.count for layer in layers)
    scale, shift = torch.ones(count), torch.ones(count)
    scale[1], shift[0] = 0.25, 3.0
    own, found = dict(subject.named_parameters()), scaled(subject, layers, scale, shift)
    first = layers[0]
    assert first.bias is not None
    assert torch.equal(found[first.weight], own[first.weight] * torch.tensor([1.0, 0.25]))
    assert torch.equal(found[first.bias], own[first.bias] * torch.tensor([3.0, 1.0]))
    assert torch.equal(found[layers[1].weight], own[layers[1].weight])


@pytest.mark.parametrize("kind", ["BatchNorm", "hidden units"])
def test_masks_are_in_the_exported_weights(kind: str) -> None:
    subject = encoder() if kind == "BatchNorm" else toy_transformer()
    layers = gains(subject)
    keep = torch.ones(sum(layer.count for layer in layers), dtype=torch.bool)
    keep[-1] = keep[0] = False
    result = without(subject, layers, keep)
    weights = result.state_dict()
    assert float(weights[layers[0].weight][0].abs().sum()) == 0
    assert float(weights[layers[-1].weight][-1].abs().sum()) == 0
    images = torch.rand(4, 3, 8, 8, generator=Rng(2).generator())
    parameters = scaled(subject, layers, keep.float(), torch.ones(len(keep)))
    with torch.no_grad():
        expected = torch.func.functional_call(subject, parameters, (images,))
        assert torch.allclose(result(images), expected)
        assert not torch.allclose(result(images), subject(images), atol=1e-6)


def test_anp_prunes_and_tells_what() -> None:
    method = ANP(steps=8, batch_size=8, lr=100.0, threshold_step=0.3, utility_floor=0.0)
    done = method.purify(encoder(), pictures(), run=run())
    json.dumps(done.evidence, allow_nan=False)
    zero = [int((done.encoder.get_parameter(name) == 0).sum()) for name in done.evidence["channels"]]
    assert zero == [len(pruned) for pruned in done.evidence["pruned"].values()]
    assert sum(zero) > 0
    assert done.evidence["threshold"] == 0.9, "the floor allows every threshold"
    assert done.evidence["utility_after"] == done.evidence["utilities"][-1] < 1
    assert done.evidence["fallback"] is None


def test_anp_says_when_it_did_nothing_and_refuses_what_it_cannot_mask() -> None:
    done = ANP(steps=1, batch_size=8, lr=1e-6, threshold_step=0.5).purify(encoder(), pictures(), run=run())
    assert "took no channel out: no mask fell" in done.evidence["fallback"]
    assert done.encoder.fingerprint == encoder().fingerprint
    with pytest.raises(EncoderError, match="neither BatchNorm with a scale nor hidden channels"):
        ANP(batch_size=8).purify(halves(), pictures(), run=run())


# MOTH.


def test_the_pair_that_grew_most_is_chosen_unless_explored() -> None:
    growth = torch.full((3, 3), -math.inf)
    usable = torch.tensor([True, False, True])
    generator = Rng(0).generator()
    assert set(choose_pair(growth, usable, 0.0, generator)) == {0, 2}, "nothing known: any usable pair"
    growth[2, 1], growth[0, 1] = 0.5, 0.1
    assert choose_pair(growth, usable, 0.0, generator) == (2, 1)
    assert set(choose_pair(growth, usable, 1.0, generator)) == {0, 2}


def test_large_triggers_are_discarded() -> None:
    def entry(size: float | None) -> Smallest:
        trigger = None if size is None else square()
        return Smallest(trigger=trigger, size=size, value=1.0, effect=float)

    assert len(small_enough([entry(0.25), entry(0.26), entry(None), entry(0.01)], 0.25)) == 2


# Neural Cleanse.


def test_only_raised_channels_are_pruned() -> None:
    gaps = torch.tensor([0.1, -0.5, 0.7, -0.1])
    assert without_most_raised(gaps, 0.25).tolist() == [True, True, False, True]
    assert without_most_raised(gaps, 1.0).tolist() == [False, True, False, True]
    assert without_most_raised(gaps, 0.2).tolist() == [True] * 4


def test_what_is_left_of_an_effect() -> None:
    assert left_over(0.9, 0.8) == pytest.approx(0.5)
    assert left_over(0.8, 0.8) == 0
    assert left_over(1.0, 0.2) == 1


def test_the_pruned_channels_are_zero_in_the_weights() -> None:
    method = NeuralCleanse(
        **_search(), objective="universal", form="prune", prune_step=0.25, utility_floor=0.0, tolerance=0.0
    )
    done = method.purify(encoder(), pictures(), run=run())
    pruned = done.evidence["pruned"]
    assert any(pruned.values())
    for name, channels in pruned.items():
        producer: Any = done.encoder.backbone.get_submodule(name)
        assert not bool(producer.weight[channels].any())


# All of them.


def _search() -> dict[str, Any]:
    return {
        "feature_space": "standardised",
        "beta": 0.1,
        "restarts": 1,
        "search_steps": 5,
        "search_batch": 8,
        "batch_size": 8,
    }


@pytest.mark.parametrize(
    "method",
    [
        ANP(steps=2, batch_size=8, threshold_step=0.5),
        DecreeUnlearn(**_search(), epochs=1, utility_floor=0),
        NeuralCleanse(**_search(), objective="universal", epochs=1, utility_floor=0),
        NeuralCleanse(**_search(), objective="universal", form="prune", prune_step=0.5, utility_floor=0),
        NeuralCleanse(
            clusters=3,
            success=0.1,
            search_steps=2,
            search_batch=8,
            epochs=1,
            batch_size=8,
        ),
        MOTH(clusters=3, rounds=1, warm_up_steps=1, search_steps=2, pair_steps=1, success=0.1, batch_size=8),
    ],
    ids=lambda method: method.name,
)
def test_networks_without_batchnorm_work(method: Defense) -> None:
    done = method.purify(toy_transformer(), pictures(), run=run())
    json.dumps(done.evidence, allow_nan=False)
    assert bool(done.encoder(torch.rand(2, 3, 8, 8)).isfinite().all())
    assert all(parameter.requires_grad for parameter in done.encoder.parameters())


@pytest.mark.parametrize(
    "method",
    [
        DecreeUnlearn(**(_search() | {"beta": 0.999999, "search_steps": 1})),
        NeuralCleanse(**(_search() | {"objective": "universal", "beta": 0.999999, "search_steps": 1})),
        MOTH(clusters=3, rounds=1, search_steps=1, pair_steps=1, success=1.0, largest=1e-6, batch_size=8),
    ],
    ids=lambda method: method.name,
)
def test_without_a_trigger_the_encoder_comes_back_with_a_reason(method: Defense) -> None:
    done = method.purify(encoder(), pictures(), run=run())
    assert "the encoder is returned as it was" in done.evidence["fallback"]
    assert done.encoder.fingerprint == encoder().fingerprint


def test_the_floor_holds_what_unlearning_breaks() -> None:
    method = DecreeUnlearn(**_search(), epochs=1, lr=50.0, utility_floor=0.99)
    done = method.purify(encoder(), pictures(), run=run())
    assert "below the floor of 0.99" in done.evidence["fallback"]
    assert done.encoder.fingerprint == encoder().fingerprint


def test_the_detector_on_a_classifier_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.randn(9, 2, generator=Rng(0).generator()), "bias": torch.zeros(9)}, path)
    found = Detect(classifier_file=str(path), steps=2, batch_size=8).detect(halves(), pictures(), run=run())
    assert found.evidence["answers_from"] == "classifier"
    assert len(found.evidence["found"]) == 9
    assert sum(entry["images"] for entry in found.evidence["found"]) == 40


def test_too_few_images_for_the_clusters() -> None:
    with pytest.raises(
        ImageError, match="Taking 50 clusters in the place of classes needs at least 50 images"
    ):
        Detect(clusters=50).detect(encoder(), pictures(), run=run())
    with pytest.raises(ImageError, match="MOTH in batches of 128, with a fifth held out, needs at least"):
        MOTH().purify(encoder(), pictures(), run=run())
