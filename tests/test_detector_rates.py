"""Rates of detectors over a zoo, by hand; and that judging afterwards is the same as giving references."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from encoderguard.bench.auroc import auroc
from encoderguard.bench.detector_rates import (
    beside,
    bound_at,
    cross_entropy,
    half,
    of_one_training,
    references_of,
    summary,
)
from encoderguard.detectors.trigger_search import TriggerSearch
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.zoo import Entry

RESNET = {"architecture": "encoderguard:resnet18", "width": 16, "stem": "cifar"}


def entry(name: str, seed: int, *, asr: float | None = None, encoder: dict[str, Any] | None = None) -> Entry:
    return Entry(
        name=name,
        status="built",
        attack=None if asr is None else name.split("-")[0],
        clean=None if asr is None else f"simclr-{seed}",
        pretrain="simclr",
        seed=seed,
        encoder=encoder or RESNET,
        asr=asr,
    )


ZOO = [
    *(entry(f"simclr-{seed}", seed) for seed in range(3)),
    entry("strong-0", 0, asr=0.99),
    entry("strong-1", 1, asr=0.97),
    entry("strong-2", 2, asr=0.97),
    entry("weak-1", 1, asr=0.3),
]


def row(name: str, score: float, detector: str = "decree", **more: Any) -> dict[str, Any]:
    settings = {"tau": 0.1, "margin": 1.5}
    base = {"encoder": name, "detector": detector, "settings": settings, "score": score}
    return base | {"verdict": "inconclusive", "wall_seconds": 2.0, "cpu_seconds": 1.0} | more


def searched(name: str, patch: float, moved: float | None = None) -> dict[str, Any]:
    settings = {"fpr": 0.05, "margin": 0.25, "prior_spread": 0.2, "moved_spread": 0.2}
    families = {
        "patch": {"statistic": patch, "displacements": [0.3, 0.1 if moved is None else moved]},
        "warp": {"statistic": 0.0, "displacements": [0.1]},
    }
    return row(name, patch / (1 + patch), "trigger_search", settings=settings, families=families)


def test_references_are_clean_and_neither_the_suspect_nor_its_origin() -> None:
    wide = entry("simclr-9", 9, encoder=RESNET | {"width": 64})
    assert references_of(ZOO[0], [*ZOO, wide]) == ["simclr-1", "simclr-2"]
    assert references_of(ZOO[4], [*ZOO, wide]) == ["simclr-0", "simclr-2"]
    assert references_of(wide, [*ZOO, wide]) == []


def test_one_training_is_the_most_common_of_method_settings_and_number_of_images() -> None:
    moco = ZOO[0].model_copy(update={"pretrain": "moco"})
    longer = ZOO[0].model_copy(update={"pretrain_settings": {"epochs": 20}})
    fewer = ZOO[0].model_copy(update={"images": {"count": 5}})
    assert of_one_training([moco, *ZOO[:2], longer, fewer]) == ZOO[:2]
    assert of_one_training([]) == []
    assert [half(e) for e in ZOO[:3]] == ["tune", "report", "report"]


def test_auroc_and_the_bound_at_a_false_positive_rate() -> None:
    found = auroc([1.0, 2.0, 3.0], [2.5, 4.0])
    assert found is not None
    assert found["value"] == pytest.approx(5 / 6)
    assert found["low"] <= found["value"] <= found["high"] == 1
    assert auroc([], [1.0]) is None
    assert bound_at([1.0, 3.0, 2.0]) == 3
    assert bound_at([float(k) for k in range(40)]) == 37  # 38 and 39, 5 % of 40, lie above


def test_a_decree_score_is_turned_round_and_judged_beside_the_references() -> None:
    clean = [row("simclr-0", 0.12), row("simclr-2", 0.15)]
    score, verdict, p = beside(row("strong-1", 0.079), clean)
    assert (score, verdict) == (-0.079, "backdoored")
    assert p == pytest.approx(1 / 3)
    assert beside(row("strong-1", 0.1), clean)[1] == "inconclusive"
    assert beside(row("strong-1", 1.0), clean)[1] == "inconclusive"


def test_cross_entropy_needs_other_seeds_and_beats_the_base_rate_when_scores_tell() -> None:
    cases = [
        {"attack": name, "seed": seed, "score": score}
        for seed in range(6)
        for name, score in ((None, 0.0), ("a", 1.0))
    ]
    found = cross_entropy(cases)
    assert found is not None
    assert found["base_rate"] == pytest.approx(math.log(2))
    assert found["value"] < 0.4
    assert cross_entropy(cases[:2]) is None


def test_the_summary_counts_per_attack_and_leaves_weak_attacks_out_where_it_says_so() -> None:
    rows = [
        searched(e.name, {"strong-0": 1.5, "strong-1": 1.6, "strong-2": 0.2}.get(e.name, 0.2)) for e in ZOO
    ]
    failed = {"encoder": "weak-1", "detector": "abs", "error": "no channels"}
    found = summary([*rows, failed], ZOO)
    blocks = {block["name"]: block["detectors"]["trigger_search"] for block in found["blocks"]}
    everything, working = blocks["all, all attacks"], blocks["all, ASR >= 80%"]
    assert everything["clean"] == 3
    assert everything["backdoored"] == 4
    assert everything["auroc"]["value"] == pytest.approx((2 + 2 * 0.5) / 4)
    assert everything["at_fpr"]["attacks"]["strong"]["found"] == 2
    assert everything["verdicts"] == {"clean": {"clean": 3}, "backdoored": {"backdoored": 2, "clean": 2}}
    assert everything["verdicts_alone"]["backdoored"] == {"inconclusive": 4}
    assert working["backdoored"] == 3
    assert blocks["report, all attacks"]["clean"] == 2
    assert found["failed"] == [failed]
    assert found["few_references"] == []


def test_without_references_there_is_no_score_and_the_encoder_is_named() -> None:
    found = summary([searched("simclr-0", 0.2), searched("strong-0", 1.5)], ZOO)
    block = found["blocks"][0]["detectors"]
    assert block["trigger_search"]["not_scored"] == ["simclr-0", "strong-0"]
    assert block["trigger_search"]["auroc"] is None
    assert block["trigger_search, no references"]["auroc"]["value"] == 1
    assert found["few_references"] == ["simclr-0", "strong-0"]


def test_a_displacement_stands_out_though_a_natural_weakness_collapses_more() -> None:
    rows = [searched(f"simclr-{seed}", 0.2) for seed in range(3)]
    found = summary([*rows, searched("strong-1", 0.2, moved=0.9)], ZOO)
    block = found["blocks"][0]["detectors"]
    assert block["trigger_search, collapse alone"]["auroc"]["value"] == 0.5
    assert block["trigger_search, displacement alone"]["auroc"]["value"] == 1
    assert block["trigger_search"]["auroc"]["value"] == 1
    assert block["trigger_search"]["verdicts"]["backdoored"] == {"backdoored": 1}


def test_judging_afterwards_is_what_references_would_give(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), generator=Rng(3).generator(), dtype=torch.uint8)
    images = ImageSet.from_arrays(pixels, name="noise")
    spec = EncoderSpec(architecture="encoderguard:resnet18", width=2)
    encoders = [Encoder.build(spec, Rng(seed)).eval() for seed in range(3)]
    files = [str(tmp_path / f"{k}.safetensors") for k in (1, 2)]
    for encoder, file in zip(encoders[1:], files, strict=True):
        encoder.save(Path(file))
    short: dict[str, Any] = {
        "families": ("patch", "colour"),
        "images": 8,
        "scale": 0.05,
        "keep": 1,
        "starts": 1,
        "steps": 1,
        "tune_steps": 0,
    }
    alone = TriggerSearch(**short)
    rows = []
    for encoder in encoders:
        evidence = alone.detect(encoder, images, run=Run(rng=Rng(0))).evidence
        facts = {"settings": alone.settings(), "families": evidence["families"]}
        rows.append(row("any", 0.5, "trigger_search", **facts))
    given = TriggerSearch(**short, references=tuple(files)).detect(encoders[0], images, run=Run(rng=Rng(0)))
    score, verdict, p = beside(rows[0], rows[1:])
    assert score is not None
    assert score == pytest.approx(-math.log10(1 - given.score), abs=2e-3)
    assert verdict == given.verdict
    assert p == pytest.approx(given.p_value, abs=2e-3)
