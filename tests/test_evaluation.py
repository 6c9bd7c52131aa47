import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import ImageError, SettingError
from encoderguard.evaluation import (
    Evaluation,
    Measure,
    evaluate_encoder,
    measure,
    target_of_reference,
)
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.probes import KNNProbe, MLPProbe
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.triggers import Patch

RUN = Run(rng=Rng(0), precision="float32")
NEAREST = KNNProbe(k=1)
TRIGGER = Patch(size=2, margin=0)
COLOURS = ("red", "green", "blue")


def colours(*labels: int, classes: tuple[str, ...] = COLOURS, name: str = "colours") -> ImageSet:
    """8 x 8 images of one colour each; the label is the colour."""
    pixels = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[label] = 200
    return ImageSet.from_arrays(pixels, labels=torch.tensor(labels), classes=classes, name=name)


class TopLeft(nn.Module):
    """The colour of the upper left pixel; a white lower right pixel makes it blue if there is a backdoor."""

    def __init__(self, backdoor: bool) -> None:
        super().__init__()
        self.backdoor = backdoor
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        colour: Tensor = self.tap(x)[:, :, 0, 0]
        if not self.backdoor:
            return colour
        white = x[:, :, -1, -1].amin(1, keepdim=True) > 0.99
        return torch.where(white, torch.tensor([0.0, 0.0, 0.5]), colour)


def encoder(backdoor: bool = False) -> Encoder:
    return Encoder.wrap(TopLeft(backdoor), taps=["tap"])


def toy() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0))


def noise(n: int, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=Rng(seed).generator())
    return ImageSet.from_arrays(pixels, name="noise")


def evaluate(**changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "encoder": encoder(backdoor=True),
        "train": colours(0, 1, 2, 0, 1, 2),
        "test": colours(0, 0, 1, 2),
        "run": RUN,
        "probe": NEAREST,
        "trigger": TRIGGER,
        "target": 2,
    }
    return evaluate_encoder(**(arguments | changes))


def share(found: Measure | None) -> tuple[float, int]:
    assert found is not None
    return found.mean, found.n


# measures


def test_one_probe_gives_the_wilson_interval() -> None:
    found = measure([torch.tensor([True] * 8 + [False] * 2)])
    z, n, p = 1.959964, 10, 0.8
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.mean, found.std, found.interval, found.n) == (0.8, None, "wilson", 10)
    assert found.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
    assert found.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


def test_several_probes_give_the_t_interval_over_seeds() -> None:
    hits = [torch.arange(10) < k for k in (4, 5, 6)]
    found = measure(hits)
    assert found.per_seed == [0.4, 0.5, 0.6]
    assert found.interval == "student-t"
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(0.1)
    half = 4.302653 * 0.1 / math.sqrt(3)  # the table's t for 2 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_intervals_stay_within_zero_and_one() -> None:
    found = measure([torch.arange(10) < k for k in (10, 9)])
    assert (found.high, found.low > 0) == (1.0, True)
    assert measure([torch.ones(5, dtype=torch.bool)]).high == 1.0


# evaluation


def test_a_perfect_backdoor_and_its_clean_twin_by_hand() -> None:
    """Test images: two red, one green, one blue (the target); stamped ones look blue if backdoored."""
    found = evaluate(clean_encoder=encoder(backdoor=False))
    assert [share(m) for m in (found.acc, found.asr, found.asr_all)] == [(1, 4), (1, 3), (1, 4)]
    clean = [share(m) for m in (found.clean_acc, found.clean_asr, found.clean_asr_all)]
    assert clean == [(1, 4), (0, 3), (0.25, 4)]
    assert (found.n_train, found.n_test, found.n_target) == (6, 4, 1)
    assert (found.target, found.target_name) == (2, "blue")
    assert (found.probe, found.probe_settings["k"], found.seeds) == ("knn", 1, 1)


def test_without_a_trigger_only_accuracy_is_measured() -> None:
    wrong = ImageSet.from_arrays(colours(0, 0, 1, 2).take(range(4)), labels=[0, 1, 1, 2], classes=COLOURS)
    found = evaluate(test=wrong, trigger=None, target=None)
    assert found.acc.mean == 0.75
    assert (found.asr, found.asr_all, found.clean_acc, found.target, found.n_target) == (None,) * 5


def test_the_record_survives_json() -> None:
    found = evaluate(clean_encoder=encoder(), probe=MLPProbe(epochs=2, hidden=(4, 4)), seeds=2)
    assert Evaluation.model_validate(json.loads(found.model_dump_json())) == found


def test_random_probes_are_repeated_and_reproducible() -> None:
    probe = MLPProbe(epochs=30, learning_rate=0.01, hidden=(4, 4))
    first, second = (evaluate(probe=probe, seeds=4, test=colours(*[0, 1, 2] * 10)) for _ in range(2))
    assert first == second
    assert (len(first.acc.per_seed), first.seeds, first.acc.interval) == (4, 4, "student-t")
    assert len(set(first.acc.per_seed)) > 1


def test_a_probe_without_randomness_is_fitted_once() -> None:
    found = evaluate(seeds=5)
    assert (found.seeds, found.acc.interval, len(found.acc.per_seed)) == (1, "wilson", 1)


def test_classes_may_be_unnamed() -> None:
    found = evaluate(train=colours(0, 1, 2, classes=()), test=colours(0, 1, classes=()))
    assert (found.acc.mean, found.target, found.target_name) == (1, 2, None)
    assert evaluate(train=colours(0, 1, 2, classes=())).target_name == "blue"
    assert evaluate(test=colours(0, 1, 2, classes=())).target_name == "blue"


def test_the_target_may_be_a_class_that_the_test_set_does_not_hold() -> None:
    found = evaluate(test=colours(0, 1))
    assert found.asr == found.asr_all
    assert found.n_target == 0


def test_the_encoder_is_unchanged() -> None:
    model = toy().train()
    fingerprint = model.fingerprint
    evaluate(encoder=model)
    assert (model.fingerprint, model.training) == (fingerprint, True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": None}, SettingError, "trigger was given but no target label.*pass --target"),
        ({"trigger": None}, SettingError, "target label means nothing without a trigger"),
        ({"target": 3}, SettingError, r"must lie in 0\.\.2, found 3"),
        ({"target": -1}, SettingError, r"must lie in 0\.\.2, found -1"),
        ({"seeds": 0}, SettingError, "seeds must be at least 1, found 0"),
        ({"probe": "svm"}, SettingError, "Unknown probe 'svm'"),
        (
            {"test": colours(2, 2, name="blues")},
            ImageError,
            "All 2 images of blues are of the target class 2",
        ),
        ({"train": noise(4)}, ImageError, "needs labels, but noise has none"),
        ({"test": noise(4)}, ImageError, "needs labels, but noise has none"),
        (
            {"test": colours(0, 1, classes=("rot", "gruen", "blau"), name="farben")},
            ImageError,
            r"same classes, but colours has 3 \(red, green, blue\) and farben has 3 \(rot, gruen, blau\)",
        ),
        (
            {"train": colours(0, 1, classes=()), "test": colours(2, classes=(), name="more"), "target": 1},
            ImageError,
            "but colours has labels up to 1 and more has labels up to 2",
        ),
    ],
)
def test_misuse_is_told_in_one_sentence(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(**changes)


# the reference image


def test_the_target_is_what_the_probe_calls_the_reference() -> None:
    train = colours(0, 1, 2)
    classifier = NEAREST.fit(extract(encoder(), train, run=RUN), torch.arange(3), classes=3, run=RUN)
    for label in range(3):
        assert target_of_reference(encoder(), classifier, colours(label).take([0])[0]) == label


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_a_reference_of_another_shape_or_type_is_refused(image: Tensor) -> None:
    classifier = NEAREST.fit(torch.eye(3), torch.arange(3), classes=3, run=RUN)
    with pytest.raises(ImageError, match=r"must be uint8 of shape \[3, H, W\]"):
        target_of_reference(encoder(), classifier, image)
