"""DECREE on planted toys, its schedule, and the rule that turns a score into a verdict."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.calibration import CLEAN_SCORES, judge, known_clean, rank_p_value
from encoderguard.detectors.decree import Decree
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import ImageError, SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import Detection
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.triggers import MaskedPattern

RUN = Run(rng=Rng(0))
PATCH = (slice(23, 31), slice(23, 31))


class Planted(nn.Module):
    """Diverse features; if ``planted``, a white 8 x 8 patch moves them to one vector."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.planted, self.pool = planted, nn.AvgPool2d(4)
        self.register_buffer("out", torch.randn(192, 16, generator=generator))
        self.register_buffer("target", 10 * torch.randn(16, generator=generator))
        self.out: Tensor
        self.target: Tensor

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.pool(x - 0.5).flatten(1) @ self.out
        gate = x[(..., *PATCH)].mean((1, 2, 3)).pow(4)[:, None] * self.planted
        return z + gate * (self.target - z)


@cache
def shadow(name: str = "shadow") -> ImageSet:
    coarse = torch.rand(128, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return ImageSet.from_arrays((F.interpolate(coarse, (32, 32), mode="bilinear") * 255).byte(), name=name)


def encoder(planted: bool) -> Encoder:
    return Encoder.wrap(Planted(planted).eval(), taps=("pool",))


def detect(planted: bool, **settings: object) -> Detection:
    given = {"max_steps": 300, "batch_size": 32, "clean_scores": (0.45, 0.5), **settings}
    return Decree(**given).detect(encoder(planted), shadow(), run=RUN)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["fast", "authors"])
def test_a_planted_patch_is_recovered(schedule: str) -> None:
    found = detect(True, schedule=schedule)
    assert found.verdict == "backdoored"
    assert found.score < 0.1
    assert isinstance(found.trigger, MaskedPattern)
    recovered, true = found.trigger.mask > 0.5, torch.zeros(32, 32, dtype=torch.bool)
    true[PATCH] = True
    assert (recovered & true).sum() / (recovered | true).sum() >= 0.7
    assert found.trigger.pattern[:, true].mean() > 0.9


def test_the_clean_twin_is_not_called_backdoored() -> None:
    found = detect(False)
    assert found.verdict != "backdoored"
    assert found.score > 0.3


class Positive(Planted):
    """The same features far from the origin: clean images are alike already, as behind a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 20


def test_standardising_removes_what_clean_images_have_in_common() -> None:
    marked = Encoder.wrap(Positive(False).eval(), taps=("pool",))
    raw, centred = (
        Decree(batch_size=32, max_steps=16, feature_space=space).detect(marked, shadow(), run=RUN)
        for space in ("raw", "standardised")
    )
    assert raw.evidence["cosine_of_clean_images"] > 0.9
    assert abs(centred.evidence["cosine_of_clean_images"]) < 0.05
    assert raw.score < centred.score


def test_the_verdict_holds_in_float32_on_all_images() -> None:
    found = detect(True)
    assert isinstance(found.trigger, MaskedPattern)
    run = Run(rng=Rng(9), precision="float32")
    cosine = float(mean_pairwise_cosine(extract(encoder(True), shadow(), run=run, trigger=found.trigger)))
    assert cosine > 0.99
    assert found.evidence["cosine_of_stamped_images"] == pytest.approx(cosine, abs=1e-5)
    assert found.score == pytest.approx(float(found.trigger.mask.mean()))


def test_the_evidence_is_json_and_says_what_the_verdict_rests_on() -> None:
    found = detect(True)
    evidence = json.loads(json.dumps(found.evidence))
    assert evidence["clean_references"] == [
        {"score": 0.45, "source": "given by the user"},
        {"score": 0.5, "source": "given by the user"},
    ]
    assert evidence["ratio_to_smallest_clean"] == pytest.approx(found.score / 0.45)
    assert evidence["reason"].endswith("(2 own clean encoders from 0.450 to 0.500)")
    assert abs(evidence["cosine_of_clean_images"]) < 0.2
    assert [set(r) for r in evidence["restarts"]] == [{"smallest_mask_on_a_batch", "steps", "outcome"}] * 3
    assert set(evidence["curves"]) == {f"{kind}/{r}" for kind in ("loss", "size") for r in range(3)}
    assert found.p_value == pytest.approx(1 / 3)
    assert found.threshold == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_detection() -> None:
    first, second = detect(True, max_steps=40), detect(True, max_steps=40)
    assert (first.score, first.evidence) == (second.score, second.evidence)


def test_without_a_trigger_the_score_is_one_and_nothing_is_decided() -> None:
    found = detect(False, max_steps=2)
    assert (found.verdict, found.score, found.trigger) == ("inconclusive", 1.0, None)
    assert found.evidence["reason"] == "no restart found a trigger with mean cosine above 0.99 on all images"
    assert found.evidence["restarts"][0]["smallest_mask_on_a_batch"] is None
    assert detect(False, max_steps=2, calibrated=False).verdict == "clean", "as published"


def test_the_published_rule_can_be_had() -> None:
    found = detect(True, calibrated=False)
    assert (found.verdict, found.threshold) == ("backdoored", 0.1)


def test_the_authors_schedule_in_steps() -> None:
    small = Decree(schedule="authors")._plan(ImageSet.from_arrays(torch.zeros(1000, 3, 32, 32).byte()))
    assert small.learning_rates == ((0, 0.5), (210, 0.1), (350, 0.05))
    assert (small.batch_sizes, small.stale_steps, small.penalty.lowest) == (((0, 128),), 10, 1e-5)
    assert (small.goal, small.betas, small.rungs, small.round_steps) == (-0.99, (0.5, 0.9), (), None)
    large = Decree(schedule="authors", max_steps=10**6)._plan(
        ImageSet.from_arrays(torch.zeros(128, 3, 224, 224).byte())
    )
    assert large.learning_rates == ((0, 0.5), (200, 0.1), (500, 0.05))
    assert (large.stale_steps, large.penalty.lowest, large.max_steps) == (35, 1e-7, 1000)


@pytest.mark.parametrize(("restarts", "rungs"), [(1, ()), (2, (24,)), (3, (24, 32)), (8, (24, 32, 40))])
def test_the_fast_schedule_ends_with_one_restart(restarts: int, rungs: tuple[int, ...]) -> None:
    plan = Decree(restarts=restarts)._plan(shadow())
    assert plan.rungs == rungs
    assert plan.goal == pytest.approx(-0.992)
    assert plan.batch_sizes == ((0, 16), (24, 32))


def test_misuse_is_named() -> None:
    one = ImageSet.from_arrays(torch.zeros(1, 3, 32, 32).byte())
    with pytest.raises(ImageError, match="DECREE needs at least 2 images"):
        Decree().detect(encoder(True), one, run=RUN)
    for wrong in ({"restarts": 0}, {"tau": 2}, {"margin": 0.5}, {"feature_space": "pca"}):
        with pytest.raises(SettingError, match=f"Setting '{next(iter(wrong))}' of detector 'decree'"):
            Decree(**wrong)


# name, score, own, table, verdict
CASES = [
    ("published references: the logs' backdoored ResNet-18", 0.05, (), (0.125, 0.127, 0.112), "backdoored"),
    ("published references: its clean twin", 0.12, (), (0.125, 0.127, 0.112), "clean"),
    ("below tau, but not clearly below clean ones", 0.09, (), (0.125, 0.127, 0.112), "inconclusive"),
    ("the width-16 trial: nobody can tell .081 from .088", 0.081, (), (0.088, 0.090), "inconclusive"),
    (
        "a clean encoder below tau stays undecided with published references",
        0.089,
        (),
        (0.088,),
        "inconclusive",
    ),
    ("own references replace tau", 0.046, (0.045, 0.06), (), "clean"),
    ("own references, slightly lower", 0.04, (0.045, 0.06), (), "inconclusive"),
    ("own references, clearly lower", 0.005, (0.045, 0.06), (), "backdoored"),
    ("own references above tau: .11 is small there", 0.11, (0.3, 0.4), (), "backdoored"),
    ("nothing known: small is not enough", 0.05, (), (), "inconclusive"),
    ("nothing known: tiny", 0.01, (), (), "backdoored"),
    ("nothing known: large", 0.2, (), (), "clean"),
]


@pytest.mark.parametrize(
    ("score", "own", "table", "verdict"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_the_verdict_rule(
    score: float, own: tuple[float, ...], table: tuple[float, ...], verdict: str
) -> None:
    assert judge(score, tau=0.1, margin=1.5, own=own, table=table).verdict == verdict


scores = st.floats(0.001, 1)
references = st.lists(scores, max_size=4)


@given(low=scores, high=scores, tau=scores, margin=st.floats(1, 10), own=references, table=references)
def test_a_larger_score_is_never_more_suspicious(
    low: float, high: float, tau: float, margin: float, own: list[float], table: list[float]
) -> None:
    low, high = min(low, high), max(low, high)
    order = {"backdoored": 0, "inconclusive": 1, "clean": 2}
    a, b = (judge(score, tau=tau, margin=margin, own=own, table=table) for score in (low, high))
    assert order[a.verdict] <= order[b.verdict]
    assert a.threshold <= a.clean_from


def test_rank_p_values() -> None:
    assert rank_p_value(0.05, []) is None
    assert rank_p_value(0.05, [0.1, 0.2, 0.3]) == 0.25
    assert rank_p_value(0.2, [0.1, 0.2, 0.3]) == 0.75


def test_references_are_those_of_the_same_architecture_only() -> None:
    spec = EncoderSpec(architecture="encoderguard:resnet18", width=64)
    assert [entry.score for entry in known_clean(spec, 32, "raw", "cifar10:train")] == [0.125, 0.127]
    assert [entry.score for entry in known_clean(spec, 32, "raw", "STL10")] == [0.112]
    assert known_clean(spec, 32, "raw", "photos") == []
    assert known_clean(spec, 224, "raw", "cifar10") == []
    assert known_clean(spec, 32, "standardised", "cifar10") == []
    assert known_clean(spec.model_copy(update={"stem": "imagenet"}), 32, "raw", "cifar10") == []
    assert all(0 < entry.score < 1 and entry.source for entry in CLEAN_SCORES)


def test_known_encoders_are_used_and_named() -> None:
    known = EncoderSpec(architecture="encoderguard:resnet18", width=64)
    marked = encoder(True)
    marked.spec = marked.spec.model_copy(update={"architecture": known.architecture, "width": 64})
    found = Decree(batch_size=32, max_steps=150).detect(marked, shadow("like cifar10"), run=RUN)
    assert found.verdict == "backdoored"
    assert found.threshold == pytest.approx(0.125 / 1.5)
    assert found.p_value == pytest.approx(1 / 3)
    assert found.evidence["clean_references"][0] == {
        "score": 0.125,
        "images": "cifar10",
        "source": "third-party log of the authors' code",
    }


def test_few_images_give_a_score_and_no_verdict() -> None:
    few = shadow().subset(range(60))
    found = Decree(batch_size=32, max_steps=150).detect(encoder(True), few, run=RUN)
    assert found.verdict == "inconclusive"
    assert found.evidence["reason"].endswith(
        "but 60 images are too few, give 100 at least: a mask that suits few is small"
    )
    own = Decree(batch_size=32, max_steps=150, clean_scores=(0.45, 0.5)).detect(encoder(True), few, run=RUN)
    assert own.verdict == "backdoored"
