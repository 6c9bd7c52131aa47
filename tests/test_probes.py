import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from encoderguard.errors import ImageError, NonFiniteError, SettingError
from encoderguard.probes import PROBES, KNNProbe, LinearProbe, MLPProbe, Probe, make_probe
from encoderguard.random import Rng
from encoderguard.run import Run, Stopped, StopSignal

RUN = Run(rng=Rng(0), precision="float32")
SMALL = MLPProbe(epochs=12, batch_size=16, learning_rate=3e-3, hidden=(32, 16))
ALL: list[Probe] = [SMALL, LinearProbe(), KNNProbe(k=5)]


def blobs(n: int, classes: int = 4, part: str = "train", spread: float = 0.2) -> tuple[Tensor, Tensor]:
    """Points around the axes of 8 dimensions, one axis per class."""
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 8, generator=Rng(5).generator(part))
    return F.one_hot(labels, 8).float() * 3 + spread * noise, labels


@pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
def test_a_probe_separates_well_separated_classes(probe: Probe) -> None:
    x, y = blobs(160)
    held_out, truth = blobs(80, part="test")
    classifier = probe.fit(x, y, classes=4, run=RUN)
    found, chances = classifier.predict(held_out), classifier.probabilities(held_out)
    assert found.dtype == torch.int64
    assert (found == truth).float().mean() >= 0.98
    assert chances.shape == (80, 4)
    assert chances.dtype == torch.float32
    torch.testing.assert_close(chances.sum(1), torch.ones(80))
    torch.testing.assert_close(chances.argmax(1), found)


@pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
def test_only_the_direction_of_a_feature_vector_counts(probe: Probe) -> None:
    x, y = blobs(80, spread=1.0)
    classifier = probe.fit(x, y, classes=4, run=RUN)
    again = probe.fit(x * torch.linspace(0.5, 9, 80)[:, None], y, classes=4, run=RUN)
    torch.testing.assert_close(classifier.probabilities(3 * x), again.probabilities(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
def test_a_class_without_training_images_keeps_its_column(probe: Probe) -> None:
    x, y = blobs(80, classes=2)
    chances = probe.fit(x, y * 2, classes=5, run=RUN).probabilities(x)
    assert chances.shape == (80, 5)
    assert (chances[:, [0, 2]].sum(1) > 0.9).all()


@pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
def test_the_same_seed_gives_the_same_probe_and_leaves_the_global_generator_alone(probe: Probe) -> None:
    x, y = blobs(60, spread=1.0)
    before = torch.get_rng_state()
    first, second = (probe.fit(x, y, classes=4, run=RUN).probabilities(x) for _ in range(2))
    other = probe.fit(x, y, classes=4, run=Run(rng=Rng(1), precision="float32")).probabilities(x)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, other) is not probe.stochastic


# MLP


def test_mlp_defaults_are_the_papers_and_the_presets_say_how_they_differ() -> None:
    assert MLPProbe().settings() == {
        "epochs": 500,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "hidden": [512, 256],
        "dropout": 0.5,
        "shuffle": True,
    }
    assert MLPProbe.reference() == MLPProbe(shuffle=False)
    assert MLPProbe.quick(epochs=3) == MLPProbe(epochs=3, batch_size=256, learning_rate=2e-3)


def test_mlp_step_is_plain_adam_on_cross_entropy() -> None:
    """Two epochs of one full batch, unshuffled and without dropout, redone by hand."""
    x, y = blobs(12)
    probe = MLPProbe(epochs=2, batch_size=12, learning_rate=0.01, hidden=(6, 5), dropout=0.0, shuffle=False)
    found = probe.fit(x, y, classes=4, run=RUN).probabilities(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RUN.rng.integer("probe", "weights"))
        layers = [torch.nn.Linear(8, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)]
    unit, weights = F.normalize(x), [p for layer in layers for p in layer.parameters()]

    def forward() -> Tensor:
        out: Tensor = layers[2](layers[1](layers[0](unit).relu()).relu())
        return out

    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for t in (1, 2):
        gradients = torch.autograd.grad(F.cross_entropy(forward(), y), weights)
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                w.sub_(0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    torch.testing.assert_close(found, forward().softmax(1).detach(), atol=1e-5, rtol=1e-4)


def test_mlp_without_shuffling_depends_on_the_order_of_the_images() -> None:
    x, y = blobs(64, spread=1.0)
    by_class = y.argsort()
    probe = MLPProbe(epochs=2, batch_size=8, learning_rate=0.01, hidden=(8, 8), shuffle=False)
    mixed, ordered = (probe.fit(x[o], y[o], classes=4, run=RUN) for o in (torch.arange(64), by_class))
    assert not torch.allclose(mixed.probabilities(x), ordered.probabilities(x), atol=1e-3)


@pytest.mark.parametrize("change", [{"shuffle": True}, {"dropout": 0.5}, {"batch_size": 8}])
def test_mlp_settings_take_effect(change: dict[str, Any]) -> None:
    x, y = blobs(64, spread=1.0)
    base = MLPProbe(epochs=3, batch_size=16, learning_rate=0.01, hidden=(8, 8), dropout=0.0, shuffle=False)
    plain, changed = (
        probe.fit(x, y, classes=4, run=RUN).probabilities(x)
        for probe in (base, dataclasses.replace(base, **change))
    )
    assert not torch.allclose(plain, changed, atol=1e-4)


def test_mlp_reports_every_epoch_and_stops_when_asked() -> None:
    seen: list[tuple[int, int]] = []
    stop = StopSignal()

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        seen.append((done, total))
        assert note.startswith("loss ")
        stop.requested = done == 3

    x, y = blobs(16)
    with pytest.raises(Stopped):
        MLPProbe(epochs=9).fit(x, y, classes=4, run=Run(rng=Rng(0), progress=progress, stop=stop))
    assert seen == [(1, 9), (2, 9), (3, 9)]


def test_mlp_says_when_its_loss_is_no_longer_finite() -> None:
    x, y = blobs(16)
    with pytest.raises(NonFiniteError, match="loss of the MLP probe became"):
        MLPProbe(epochs=50, learning_rate=1e30).fit(x, y, classes=4, run=RUN)


# kNN


def test_knn_weighs_votes_as_computed_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    labels = torch.tensor([0, 1, 1])
    chances = (
        KNNProbe(temperature=0.5)
        .fit(bank, labels, classes=2, run=RUN)
        .probabilities(torch.tensor([[5.0, 0.0]]))
    )
    zero, one = math.exp(1 / 0.5), math.exp(0 / 0.5) + math.exp(math.sqrt(0.5) / 0.5)
    torch.testing.assert_close(chances, torch.tensor([[zero / (zero + one), one / (zero + one)]]))


def test_knn_of_one_neighbour_copies_its_label() -> None:
    bank, labels = torch.eye(3), torch.tensor([2, 0, 1])
    classifier = KNNProbe(k=1).fit(bank, labels, classes=3, run=RUN)
    assert classifier.predict(bank + 0.1).tolist() == [2, 0, 1]


# linear


def test_linear_probe_ignores_dimensions_that_do_not_vary() -> None:
    x, y = blobs(80, spread=0.5)
    padded = F.normalize(torch.cat([F.normalize(x), torch.zeros(80, 3)], 1))
    plain, wide = (LinearProbe().fit(z, y, classes=4, run=RUN).probabilities(z) for z in (x, padded))
    torch.testing.assert_close(plain, wide, atol=1e-4, rtol=1e-3)


# misuse


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (torch.ones(4), torch.zeros(4, dtype=torch.long), 2, "needs features .* one label each"),
        (torch.ones(0, 3), torch.zeros(0, dtype=torch.long), 2, "needs features .* one label each"),
        (torch.ones(4, 3), torch.zeros(3, dtype=torch.long), 2, r"found features \[4, 3\] and labels \[3\]"),
        (torch.ones(4, 3), torch.arange(4), 3, r"must lie in 0\.\.2, found 0\.\.3"),
        (
            torch.ones(4, 3),
            torch.ones(4, dtype=torch.long),
            3,
            "at least two classes, but all are of class 1",
        ),
    ],
)
@pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
def test_unusable_data_are_refused(probe: Probe, x: Tensor, y: Tensor, classes: int, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        probe.fit(x, y, classes=classes, run=RUN)


def test_non_finite_features_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="features are NaN or infinite"):
        KNNProbe().fit(torch.tensor([[1.0], [torch.nan]]), torch.arange(2), classes=2, run=RUN)


def test_make_probe_knows_names_and_settings() -> None:
    assert make_probe("knn", k=3) == KNNProbe(k=3)
    assert make_probe("mlp", epochs=5) == MLPProbe(epochs=5)
    assert make_probe("mlp-quick") == MLPProbe.quick()
    assert make_probe("mlp-reference").settings()["shuffle"] is False
    assert {make_probe(name).name for name in PROBES} == {"mlp", "linear", "knn"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("svm", {}, "Unknown probe 'svm'; expected one of: mlp, .*linear, knn"),
        ("knn", {"epochs": 3}, "Unknown setting 'epochs' of probe 'knn'; expected one of: k, temperature"),
        ("knn", {"k": 0}, "'k' of probe 'knn' cannot be 0: input should be greater than or equal to 1"),
        ("mlp", {"dropout": 1.0}, "'dropout' of probe 'mlp' cannot be 1.0"),
        ("linear", {"inverse_regularisation": "much"}, "cannot be 'much'"),
    ],
)
def test_wrong_names_and_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_probe(name, **settings)
