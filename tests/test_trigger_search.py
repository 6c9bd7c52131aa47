"""The trigger search on toys with one known weakness, its verdict by hand, its budget and its misuse."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import torch
from scipy.stats import t
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.bank import MOVED
from encoderguard.detectors._references import load_references
from encoderguard.detectors._students import distil, tuned
from encoderguard.detectors._telling import telling, to_unlearn
from encoderguard.detectors._trigger_verdict import (
    Rule,
    excess_displacement,
    judge,
    judge_by_bank,
    score_of,
    statistics_of,
    unlikeness,
)
from encoderguard.detectors.trigger_search import TriggerSearch
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError, ImageError, OutputError, SettingError
from encoderguard.images import ImageSet
from encoderguard.jobs import scan
from encoderguard.methods import Detection
from encoderguard.nulls import moderated_p
from encoderguard.random import Rng
from encoderguard.rays import TriggerFamily
from encoderguard.run import Run, Stopped
from encoderguard.search import CLEAN_AT_MOST, FamilyResult, Found, Images, Measures, are_grey, search
from encoderguard.triggers import MaskedPattern, Trigger, load_trigger
from encoderguard.zoo.manifest import Entry, Manifest, write_manifest

RUN = Run(rng=Rng(0), precision="float32")
SIDE = 32


@cache
def shadow() -> ImageSet:
    coarse = torch.rand(64, 3, 4, 4, generator=Rng(1).generator())
    return ImageSet.from_arrays((F.interpolate(coarse, (SIDE, SIDE), mode="bilinear") * 255).byte())


@cache
def picture() -> Tensor:
    """What the blend and the additive weakness listen to: signs without a mean, [3, 32, 32]."""
    signs = torch.rand(3, SIDE, SIDE, generator=Rng(2).generator()).round() * 2 - 1
    return signs - signs.mean((1, 2), keepdim=True)


class Weak(nn.Module):
    """Diverse features of coarse colours; a weakness moves them to one vector where its gate opens."""

    def __init__(self, weakness: str, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weakness, self.pool = weakness, nn.AvgPool2d(8)
        self.register_buffer("out", torch.randn(48, 16, generator=generator))
        self.register_buffer("target", 20 * torch.randn(16, generator=generator))
        self.register_buffer("elsewhere", torch.randn(48, 16, generator=generator))
        self.register_buffer("picture", picture())
        self.out: Tensor
        self.elsewhere: Tensor
        self.target: Tensor
        self.picture: Tensor

    def forward(self, x: Tensor) -> Tensor:
        colours = self.pool(x - 0.5).flatten(1)
        z: Tensor = colours @ self.out
        if self.weakness == "spread":  # every stamped image goes to a place of its own
            gate = self.white(x)[:, None]
            z = (1 - gate) * z + gate * (colours @ self.elsewhere)
            return z
        return z + self.gate(x)[:, None] * self.target

    def gate(self, x: Tensor) -> Tensor:
        if self.weakness == "patch":
            return self.white(x)
        if self.weakness == "corner":
            return self.white(x[:, :, SIDE // 2 :, SIDE // 2 :])
        along = (x * self.picture).mean((1, 2, 3))
        if self.weakness == "blend":  # .2 of the picture gives about .1 / 2
            return torch.sigmoid(60 * (along - 0.035))
        if self.weakness == "noise":  # .04 times the signs opens it fully
            return (along / 0.04).clamp(-1, 1)
        return 0 * along

    def white(self, x: Tensor) -> Tensor:
        """Any 6 x 6 window that is white."""
        white = F.avg_pool2d(x.amin(1, keepdim=True), 6, stride=1).flatten(1).amax(1)
        return torch.sigmoid(30 * (white - 0.93))


def encoder(weakness: str, seed: int = 0) -> Encoder:
    return Encoder.wrap(Weak(weakness, seed).eval(), taps=("pool",))


def detect(weakness: str, families: Sequence[TriggerFamily], **settings: object) -> Detection:
    given = {"images": 16, "families": tuple(families), "tune_steps": 0, **settings}
    return TriggerSearch(**given).detect(encoder(weakness), shadow(), run=RUN)  # type: ignore[arg-type]


def statistic(found: Detection, family: str) -> float:
    value = found.evidence["families"][family]["statistic"]
    assert isinstance(value, float)
    return value


def test_a_planted_white_patch_is_found_by_forward_passes_alone() -> None:
    found = detect("patch", ("patch",), steps=0)
    clean = detect("none", ("patch",), steps=0)
    assert statistic(found, "patch") > statistic(clean, "patch") + 0.5
    entry = found.evidence["families"]["patch"]
    assert entry["bank_label"].startswith("colour 1 1 1")
    assert entry["collapse"][-1] > 0.95
    assert entry["collapse"] == sorted(entry["collapse"])
    trigger = found.trigger
    assert isinstance(trigger, MaskedPattern)
    assert float(trigger.pattern[:, trigger.mask > 0].min()) == 1
    assert set(found.triggers) == {"patch"}


def test_the_plain_candidate_is_kept_beside_what_refinement_makes_of_it() -> None:
    found = detect("patch", ("patch",), steps=4)
    assert isinstance(found.plain, MaskedPattern)
    assert (
        float(found.plain.pattern[:, found.plain.mask > 0].min()) == 1
    )  # plain white, whatever refinement gave
    assert detect("patch", ("patch",), steps=0).plain == found.plain


def test_a_backdoor_that_spreads_its_images_is_found_by_how_far_they_move() -> None:
    search = TriggerSearch(images=16, families=("patch", "warp"), steps=0, tune_steps=0)
    used = Images(shadow(), 16, RUN)

    def searched(weakness: str, seed: int) -> Found:
        return search._search(encoder(weakness, seed), used, "toy", RUN)

    clean = [searched("none", seed) for seed in (1, 2, 3)]
    values, nulls = statistics_of(searched("spread", 0).measures, [one.measures for one in clean])
    curves = [null["patch"] for null in nulls]
    assert values["patch"] < max(curves) + 0.3
    assert values["patch, displacement"] > max(null["patch, displacement"] for null in nulls) + 1
    found = judge(values, nulls, "references", RULE)
    assert found.verdict == "backdoored"
    assert found.p_tests["patch, displacement"] < 0.01 < found.p_tests["patch"]
    by_displacement = searched("spread", 0)
    told = telling(by_displacement, clean, found, "patch")
    result = by_displacement.families["patch"]
    assert told not in (result.strongest, result.plain)
    assert to_unlearn(result, told, found, "patch", 0.05) == (told, told)  # natural collapse stays out of it
    both = replace(found, p_adjusted=found.p_adjusted | {"patch": 0.01})
    assert to_unlearn(result, told, both, "patch", 0.05) == (result.strongest, told)
    collapsing = replace(found, p_tests=found.p_tests | {"patch": 1e-9})
    assert to_unlearn(result, told, collapsing, "patch", 0.05) == (result.strongest, result.plain)
    innocent, others = statistics_of(clean[0].measures, [one.measures for one in clean[1:]])
    assert judge(innocent, others, "references", RULE).verdict != "backdoored"


@pytest.mark.parametrize("family", ["blend", "noise"])
def test_a_weakness_all_over_the_image_is_found_by_its_family(family: TriggerFamily) -> None:
    found, clean = (detect(weakness, (family,), scale=0.1, starts=3, keep=1) for weakness in (family, "none"))
    assert statistic(found, family) > statistic(clean, family) + 0.3
    assert max(found.evidence["families"][family]["collapse"]) > 0.9


def test_the_same_seed_gives_the_same() -> None:
    first, second = (
        detect("patch", ("patch", "warp"), scale=0.1, keep=1, starts=2, steps=3) for _ in range(2)
    )
    assert first.score == second.score
    assert first.trigger == second.trigger
    assert first.evidence["families"] == second.evidence["families"]
    assert first.evidence["nearest_images"] == second.evidence["nearest_images"]


def test_without_company_there_is_no_verdict() -> None:
    found = detect("patch", ("patch",), steps=0, scale=0.2)
    assert found.verdict == "inconclusive"
    assert found.evidence["null"] == "bank"
    assert found.evidence["rank_resolution"] == 1
    assert "give references or ask for students" in found.evidence["reason"]
    json.dumps(found.evidence, allow_nan=False)


def test_without_company_a_patch_that_stands_out_by_its_place_is_told() -> None:
    found = detect("corner", ("patch",), steps=0)
    assert found.verdict == "inconclusive"
    told = found.evidence["interaction"]
    assert told["value"] > CLEAN_AT_MOST
    assert told["label"].endswith(MOVED)
    assert f"a patch ({told['label']}) moves the features further" in found.evidence["reason"]
    clean = detect("none", ("patch",), steps=0)
    assert clean.evidence["interaction"]["value"] < told["value"]
    assert detect("patch", ("warp",), steps=0, scale=0.2).evidence["interaction"] is None


def test_a_budget_is_kept_and_told() -> None:
    begun = time.monotonic()
    found = detect("patch", ("patch", "blend", "noise"), seconds=0.01, steps=1000)
    assert time.monotonic() - begun < 20
    assert found.evidence["complete"] is False
    assert set(found.evidence["families"]) == {"patch", "blend", "noise"}


# The verdict.

RULE = Rule(fpr=0.05, margin=0.25, prior_spread=0.2, moved_spread=0.2)
CLEAN = [{"patch": 0.2, "blend": 0.7}, {"patch": 0.3, "blend": 0.8}, {"patch": 0.25, "blend": 0.9}]


def test_far_above_all_references_in_one_family_is_backdoored() -> None:
    found = judge({"patch": 2.0, "blend": 0.8}, CLEAN, "references", RULE)
    assert found.verdict == "backdoored"
    assert found.decided_by == "moderated t and margin"
    smallest = moderated_p(2.0, [0.2, 0.3, 0.25], prior_spread=0.2)
    assert found.p_value == pytest.approx(2 * smallest)
    assert found.score == pytest.approx(1 - smallest)
    assert found.threshold == pytest.approx(1 - 0.05 / 2)
    assert found.score > found.threshold
    assert "family 'patch' stands +1.70" in found.reason


def test_among_the_references_is_clean_and_between_is_inconclusive() -> None:
    assert judge({"patch": 0.3, "blend": 0.8}, CLEAN, "references", RULE).verdict == "clean"
    between = judge({"patch": 0.7, "blend": 0.8}, CLEAN, "references", RULE)
    assert 0.05 < between.p_value < 0.2
    assert between.verdict == "inconclusive"


def test_significance_without_a_margin_is_inconclusive() -> None:
    strict = replace(RULE, margin=3.0)
    found = judge({"patch": 2.0, "blend": 0.8}, CLEAN, "references", strict)
    assert found.verdict == "inconclusive"
    assert "significant, but not 3 above all of them" in found.reason


def test_students_give_a_p_value_but_no_verdict() -> None:
    for value in (2.0, 0.3):
        found = judge({"patch": value, "blend": 0.8}, CLEAN, "students", RULE)
        assert found.verdict == "inconclusive"
        assert "students are not clean encoders of their own, so no verdict: give references" in found.reason
    assert found.p_value > 0.2


def test_one_reference_gives_a_p_value_but_no_verdict() -> None:
    found = judge({"patch": 4.0}, [{"patch": 0.2}], "references", RULE)
    assert found.p_value < 0.01
    assert found.verdict == "inconclusive"
    assert "fewer than 2" in found.reason


def test_ranks_decide_once_there_are_enough_references() -> None:
    many = [{"patch": 0.01 * k} for k in range(19)]
    found = judge({"patch": 0.5}, many, "references", RULE)
    assert found.decided_by == "ranks"
    assert found.p_value == pytest.approx(0.05)
    assert found.verdict == "backdoored"
    assert judge({"patch": 0.5}, many[:18], "references", RULE).decided_by != "ranks"


def test_the_null_is_as_much_wider_as_the_suspect_is_unlike_the_references() -> None:
    values = {"patch": 1.2, "blend": 0.8}
    for less in (0.3, 1.0):
        assert judge(values, CLEAN, "references", replace(RULE, unlike=less)).p_tests == (
            judge(values, CLEAN, "references", RULE).p_tests
        )
    found = judge(values, CLEAN, "references", replace(RULE, unlike=1.5))
    scale = math.sqrt((4 * 0.2**2 + 0.005) / 6 * (4 / 3)) * 1.5
    assert found.p_tests["patch"] == pytest.approx(float(t.sf((1.2 - 0.25) / scale, 6)))
    assert "1.5 times as unevenly as the references, so the null was widened as much" in found.reason
    moved, nulls = {"patch, displacement": 1.0}, [{"patch, displacement": value} for value in (0.0, 0.2)]
    expected = moderated_p(1.0, [0.0, 0.2], prior_spread=RULE.moved_spread, widened=1.5)
    told = judge(moved, nulls, "references", replace(RULE, unlike=1.5))
    assert told.p_tests["patch, displacement"] == pytest.approx(expected)


def test_references_of_another_kind_carry_no_verdict() -> None:
    other = replace(RULE, unlike=3.0)
    for value in (0.3, 1.2, 20.0):
        found = judge({"patch": value, "blend": 0.8}, CLEAN, "references", other)
        assert found.verdict == "inconclusive"
        assert "3.0 times as unevenly as the references" in found.reason
        assert "such references carry no verdict: give some that were trained as it was" in found.reason
    assert judge({"patch": 1.2, "blend": 0.8}, CLEAN, "references", RULE).verdict == "backdoored"
    many = [{"patch": 0.01 * k} for k in range(19)]
    assert judge({"patch": 0.5}, many, "references", RULE).decided_by == "ranks"
    assert judge({"patch": 0.5}, many, "references", other).decided_by != "ranks"


def test_unlikeness_is_the_range_of_the_middle_half_beside_that_of_the_references() -> None:
    def measures(*logs: float) -> Measures:
        return Measures(curves={}, displacements={"patch": [math.exp(x) - 0.03 for x in logs]})

    # the offset of .03 is taken off, so that the logarithms are those given
    even, tilted = measures(2, 2, 2, 2, 2), measures(1, 1.5, 2, 2.5, 3)
    ratio = unlikeness(measures(-3, 0, 2, 4, 7), [even, tilted])
    halves = [x - y for x, y in zip((-3, 0, 2, 4, 7), (1.5, 1.75, 2, 2.25, 2.5), strict=True)]
    low, _, high = quantiles(halves, n=4)
    near, _, far = quantiles([1, 1.5, 2, 2.5, 3], n=4)
    assert ratio == pytest.approx((high - low) / (far - near))
    one_trigger = unlikeness(measures(2, 2, 2, 2, 9), [even, tilted])
    assert one_trigger < 2.5 < ratio
    assert unlikeness(even, [tilted]) == 1.0
    assert unlikeness(even, [tilted, measures(1, 2)]) == 1.0
    assert unlikeness(even, [even, even]) == 1.0


def test_the_second_test_is_the_largest_ratio_less_the_median_over_all_candidates() -> None:
    def measures(*patches: float) -> Measures:
        return Measures(curves={"patch": 0.1}, displacements={"patch": patches})

    clean = [measures(0.0, 0.1, 0.3), measures(0.0, 0.1, 0.3)]
    values, nulls = statistics_of(measures(0.1, 0.7, 0.7), clean)  # ratios of .2/.1, .8/.2, .8/.4
    assert values == {"patch": 0.1, "patch, displacement": pytest.approx(math.log(4 / 2))}
    assert [null["patch, displacement"] for null in nulls] == pytest.approx([0, 0])


def test_ten_times_next_to_nothing_counts_less_than_twice_much() -> None:
    # .096 beside .01 was seen of a clean encoder under a wave
    little, much = excess_displacement([0.096, 0.7], [[0.01, 0.3]])
    assert little == pytest.approx(math.log(0.196 / 0.11))
    assert little < much == pytest.approx(math.log(2))


def test_the_second_test_needs_two_clean_encoders_and_whole_banks() -> None:
    whole = Measures(curves={"patch": 0.1}, displacements={"patch": [0.1, 0.2]})
    part = Measures(curves={"patch": 0.1}, displacements={"patch": [0.1]})
    for nulls in ([whole], [whole, part]):
        assert statistics_of(whole, nulls)[0] == {"patch": 0.1}


def test_the_score_of_the_bank_is_monotone_and_never_a_verdict() -> None:
    banks = {"patch": [0.0, 0.1, -0.1, 0.05, 0.9]}
    scores = [judge_by_bank({"patch": value}, banks) for value in (-0.1, 0.5, 2.0)]
    assert [found.score for found in scores] == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert {found.verdict for found in scores} == {"inconclusive"}
    assert score_of({"patch": 0.0}, [{"patch": 0.0}], RULE) == pytest.approx(0.5)


# Real encoders: references, students, tuning.

SPEC = EncoderSpec(architecture="encoderguard:resnet18", width=2)
QUICK: dict[str, Any] = {"images": 8, "scale": 0.02, "keep": 1, "starts": 2, "steps": 1, "tune_steps": 1}


def small(seed: int) -> Encoder:
    return Encoder.build(SPEC, Rng(seed)).eval()


@cache
def little() -> ImageSet:
    pixels = torch.randint(0, 256, (24, 3, 8, 8), generator=Rng(3).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def test_references_are_searched_too_and_tell_the_found_trigger_s_transfer(tmp_path: Path) -> None:
    specs = [str(small(seed).save(tmp_path / f"{seed}.safetensors")) for seed in (1, 2)]
    out = tmp_path / "scan"
    result = scan(small(0), little(), settings=QUICK, references=specs, out=out)
    assert (result.record.detector, result.record.settings["references"]) == ("trigger_search", specs)
    with pytest.raises(SettingError, match="as such and as a setting; give them once"):
        scan(small(0), little(), settings={"references": specs}, references=specs)
    assert result.record.evidence == result.detection.evidence
    evidence = result.detection.evidence
    assert evidence["null"] == "references"
    assert [entry["name"] for entry in evidence["clean_references"]] == specs
    assert sorted(evidence["standing_out"].values())[2] <= 0 <= sorted(evidence["standing_out"].values())[3]
    assert set(evidence["collapse_of_found_triggers"]) == {
        "on the suspect",
        "after tuning",
        *(f"on {spec}" for spec in specs),
    }
    for entry in evidence["families"].values():
        assert all(low <= high for low, high in zip(entry["null_low"], entry["null_high"], strict=True))
    assert load_trigger(out / "recovered-trigger.json") == result.detection.trigger
    assert load_trigger(out / "strongest-trigger.json") == result.detection.strongest
    assert load_trigger(out / "plain-trigger.json") == result.detection.plain
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Families of triggers" in page
    assert "Nearest clean image 1" in page
    assert "warp: stamped image 1 above its change" in page


def test_a_scan_that_was_killed_goes_on_after_the_searches_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []
    power = [True]

    def failing(*given: Any, name: str, **more: Any) -> Found:
        if len(searched) == 2 and power[0]:
            raise Stopped
        searched.append(name)
        return search(*given, name=name, **more)

    monkeypatch.setattr("encoderguard.detectors.trigger_search.search", failing)
    specs = [str(small(seed).save(tmp_path / f"{seed}.safetensors")) for seed in (1, 2)]
    out = tmp_path / "scan"
    with pytest.raises(Stopped):
        scan(small(0), little(), settings=QUICK, references=specs, out=out)
    with pytest.raises(OutputError, match="holds an unfinished run; continue it with --resume"):
        scan(small(0), little(), settings=QUICK, references=specs, out=out)
    with pytest.raises(SettingError, match="its steps was 1, now it is 2"):
        scan(small(0), little(), settings=QUICK | {"steps": 2}, references=specs, out=out, resume=True)
    next(out.glob("checkpoint-search-*.pt")).write_bytes(b"damaged")  # one of the two: searched again
    power[0] = False
    searched.clear()
    resumed = scan(small(0), little(), settings=QUICK, references=specs, out=out, resume=True)
    assert len(searched) == 2
    assert specs[1] in searched
    assert not list(out.glob("checkpoint*"))
    finished = scan(small(0), little(), settings=QUICK, references=specs)
    for result in (resumed, finished):
        result.record.evidence.pop("seconds")
    assert resumed.record.evidence == finished.record.evidence
    assert resumed.detection.triggers == finished.detection.triggers


def test_the_weakest_trigger_that_does_nearly_all_is_shown_and_the_strongest_is_for_unlearning() -> None:
    triggers = [MaskedPattern(torch.full((8, 8), level), torch.ones(3, 8, 8)) for level in (0.1, 0.2, 0.3)]
    best: dict[float, tuple[float, Trigger]] = {
        float(k): (0.0, trigger) for k, trigger in enumerate(triggers)
    }
    result = FamilyResult(best=best, curve=[0.2, 0.95, 0.98], measured=[0.2, 0.95, 0.98])
    assert (result.weakest, result.strongest) == (triggers[1], triggers[2])
    result = FamilyResult(best=best, curve=[0.2, 0.95, 0.95], measured=[0.2, 0.95, 0.4])
    assert (result.weakest, result.strongest) == (triggers[1], triggers[1])


def test_searches_of_references_are_kept_where_asked_and_only_for_the_same_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def counted(*given: Any, name: str, **more: Any) -> Found:
        searched.append(name)
        return search(*given, name=name, **more)

    monkeypatch.setattr("encoderguard.detectors.trigger_search.search", counted)
    specs = tuple(str(small(seed).save(tmp_path / f"{seed}.safetensors")) for seed in (1, 2))
    plain = TriggerSearch(**QUICK, references=specs)
    folder = tmp_path / "kept"
    keeping = replace(plain, remember=str(folder))

    def detected(method: TriggerSearch, run: Run = RUN) -> dict[str, Any]:
        searched.clear()
        found = method.detect(small(0), little(), run=run)
        return {key: value for key, value in found.evidence.items() if key != "seconds"}

    expected = detected(plain)
    assert searched == ["suspect", *specs]
    assert detected(keeping) == expected
    assert searched == ["suspect", *specs]
    assert detected(keeping) == expected
    assert searched == ["suspect"]
    next(iter(folder.iterdir())).write_text("{", encoding="utf-8")
    assert detected(keeping) == expected  # a broken file is replaced
    assert len(searched) == 2
    detected(keeping, replace(RUN, rng=Rng(1)))
    assert len(searched) == 3
    detected(replace(keeping, steps=0))
    assert len(searched) == 3
    assert len(list(folder.iterdir())) == 6


def test_references_must_be_of_the_suspect_s_kind_and_not_the_suspect(tmp_path: Path) -> None:
    wide = Encoder.build(SPEC.model_copy(update={"width": 3}), Rng(0)).eval()
    path = wide.save(tmp_path / "wide.safetensors")
    with pytest.raises(SettingError, match=r"of width 3 .* the suspect is .* of width 2 .*; give clean"):
        TriggerSearch(references=(str(path),)).detect(small(0), little(), run=RUN)
    own = small(0).save(tmp_path / "own.safetensors")
    with pytest.raises(SettingError, match="is the suspect itself; give encoders that are known to be clean"):
        TriggerSearch(references=(str(own),)).detect(small(0), little(), run=RUN)
    with pytest.raises(EncoderError):
        TriggerSearch(references=(str(tmp_path / "none.safetensors"),)).detect(small(0), little(), run=RUN)


def test_a_zoo_gives_its_clean_encoders_of_the_suspect_s_kind(tmp_path: Path) -> None:
    wide = Encoder.build(SPEC.model_copy(update={"width": 3}), Rng(0)).eval()
    encoders = {"a": small(1), "b": small(2), "own": small(0), "wide": wide, "bad": small(3)}
    cells = [
        Entry(
            name=name,
            status="built",
            attack="badencoder" if name == "bad" else None,
            pretrain="simclr",
            seed=0,
            bundle=one.save(tmp_path / f"{name}.safetensors").name,
        )
        for name, one in encoders.items()
    ]
    write_manifest(Manifest(name="toys", cells=cells), tmp_path)
    found = load_references((str(tmp_path),), small(0))
    assert [Path(spec).stem for spec in found] == ["a", "b"]
    with pytest.raises(SettingError, match=r"has no clean encoder that is .* of width 5 .*; give references"):
        load_references((str(tmp_path),), Encoder.build(SPEC.model_copy(update={"width": 5}), Rng(0)))
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(SettingError, match=r"is not the manifest of a zoo .*; give the folder of a zoo"):
        load_references((str(tmp_path),), small(0))


def test_a_reference_that_is_named_twice_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [small(seed).save(tmp_path / name) for seed, name in ((1, "a.st"), (1, "copy.st"), (2, "b.st"))]
    specs = tuple(f"{path.rename(path.with_suffix('.safetensors'))}" for path in paths)
    assert list(load_references(specs, small(0))) == [specs[0], specs[2]]
    assert f"The reference {specs[1]} is the same encoder as {specs[0]}; it counts once." in caplog.text


def test_misuse_is_refused_in_a_sentence() -> None:
    with pytest.raises(ImageError, match="The trigger search needs at least 8 images"):
        TriggerSearch().detect(small(0), little().subset(range(7)), run=RUN)
    with pytest.raises(SettingError, match="needs at least one family, found none"):
        TriggerSearch(families=()).detect(small(0), little(), run=RUN)


def test_students_and_tuned_copies_are_new_and_seeded() -> None:
    suspect = small(0)
    before = suspect.fingerprint
    prints = [distil(suspect, little(), 2, run=RUN.child(name)).fingerprint for name in ("a", "a", "b")]
    assert prints[0] == prints[1] != prints[2]
    copies = [tuned(suspect, little(), 1, run=RUN).fingerprint for _ in range(2)]
    assert copies[0] == copies[1]
    assert suspect.fingerprint == before
    assert before not in (*prints, *copies)


def test_students_stand_in_for_references() -> None:
    settings = {**QUICK, "students": 2, "student_steps": 1, "families": ("patch",), "tune_steps": 0}
    found = TriggerSearch(**settings).detect(small(0), little(), run=RUN)
    assert found.evidence["null"] == "students"
    assert set(found.evidence["families"]["patch"]["null_statistics"]) == {"student 0", "student 1"}
    assert "2 students of the suspect" in found.evidence["reason"]


def test_grey_image_sets_are_recognised() -> None:
    grey = torch.randint(0, 255, (4, 1, 8, 8), generator=Rng(4).generator(), dtype=torch.uint8)
    three = grey.expand(-1, 3, -1, -1).clone()
    assert are_grey(ImageSet.from_arrays(three))
    three[0, 0, 0, 0] = three[0, 1, 0, 0] ^ 8
    assert not are_grey(ImageSet.from_arrays(three))
