import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoderguard.errors import UsageError
from encoderguard.report import figures, reading, render, write_report
from encoderguard.report.bars import profile_chart
from encoderguard.report.pixels import png, trigger_on_grey

RECORD = {"job": "scan", "verdict": "clean", "score": 0.2, "threshold": 0.1}
ARRAYS = {"mask": np.full((4, 4), 0.5)}


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8).repeat(2, axis=0)
    enlarged = np.asarray(Image.open(io.BytesIO(png(image))))
    assert enlarged.shape == (192, 192, 3)
    assert set(np.unique(enlarged)) == {0, 255}
    assert (enlarged[:, :96] == 0).all()


def test_a_trigger_on_grey_is_the_pattern_where_the_mask_is_one() -> None:
    mask, pattern = np.array([[1.0, 0.0]]), np.ones((1, 2, 3))
    shown = trigger_on_grey(mask, pattern)
    assert shown is not None
    assert shown[0, :, 0].tolist() == [255, 128]


def test_labels_from_a_record_are_never_read_as_mathematics() -> None:
    (profile,) = reading.profiles(
        {"profile": {"measure": r"$\foo$", "stages": [{"tap": "$^$", "held_out": 1.0}]}}
    )
    assert profile_chart(*profile).startswith(b"<?xml")
    assert figures.plain("漢字\n") == "???"


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        ({"a": 0.1, "b": 0.2}, [0.1, 0.2]),
        ([0.1, 0.2], [0.1, 0.2]),
        ({"scores": [0.1, 0.2], "mean": 0.15, "n": 2}, [0.1, 0.2]),
        ({"resnet18": [0.1], "resnet50": [0.2], "std": 3.0}, [0.1, 0.2]),
        ([{"name": "a", "score": 0.1}, {"encoder": "b", "score": 0.2}], [0.1, 0.2]),
        (None, []),
    ],
)
def test_known_scores_are_found_in_any_of_their_shapes(value: object, scores: list[float]) -> None:
    assert [score for _, score in reading.named_scores(value)] == scores


@pytest.mark.parametrize(
    ("verdict", "score", "side"),
    [
        ("backdoored", 0.05, "below"),
        ("clean", 0.2, "below"),
        ("backdoored", 0.2, "above"),
        ("inconclusive", 0.2, None),
    ],
)
def test_the_flagged_side_follows_from_verdict_and_score(
    verdict: str, score: float, side: str | None
) -> None:
    assert reading.flagged_side({"verdict": verdict, "score": score, "threshold": 0.1}) == side


def test_write_report_reads_a_folder_and_leaves_only_the_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema_version": 1, **RECORD}))
    np.savez(tmp_path / "arrays.npz", mask=ARRAYS["mask"])
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render({"schema_version": 1, **RECORD}, ARRAYS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["arrays.npz", "report.html", "result.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give the --out folder"),
        ("{", "cannot be read as a record"),
        ("[]", "holds a list"),
        ("{}", "is not a record"),
        ('{"schema_version": 99, "job": "scan"}', "schema version 99, which is newer"),
        ('{"schema_version": -1, "job": "scan"}', "schema version -1; the first is 1"),
        ('{"schema_version": Infinity, "job": "scan"}', "is not a record"),
        ('{"schema_version": 1, "job": "x"}', "unknown job 'x'"),
        ('{"schema_version": 1, "job": "scan", "verdict": "maybe"}', "not a valid scan record: verdict"),
    ],
)
def test_a_folder_without_a_record_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_pickled_or_broken_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema_version": 1, "job": "scan"}')
    np.savez(tmp_path / "arrays.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read as plain arrays"):
        write_report(tmp_path)
    (tmp_path / "arrays.npz").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(UsageError, match="cannot be read as plain arrays"):
        write_report(tmp_path)


def test_restarts_known_encoders_and_curves_are_read_as_decree_writes_them() -> None:
    evidence = {
        "restarts": [
            {"smallest_mask_on_a_batch": 0.2, "steps": 54},
            {"smallest_mask_on_a_batch": None, "steps": 9},
        ],
        "clean_references": [{"score": 0.3, "images": "digits", "source": "own"}],
        "curves": {"loss/0": [1.0, 2.0], "loss/1": [3.0, 4.0], "size/0": [5.0, 6.0]},
    }
    record = {"job": "scan", "verdict": "inconclusive", "score": 0.25, "threshold": 0.1, "evidence": evidence}
    assert reading.restart_scores(record) == [0.2]
    assert reading.known_clean(record) == [("own, digits", 0.3)]
    assert reading.curves(record) == {"loss": [[1.0, 2.0], [3.0, 4.0]], "size": [[5.0, 6.0]]}
    assert reading.flagged_side(record) == "below"


def test_intervals_and_probe_seeds_are_read_as_the_evaluation_writes_them() -> None:
    interval = {"mean": 0.9, "low": 0.8, "high": 1.0, "per_seed": [0.85, 0.95]}
    groups = reading.rate_groups({"acc": 0.9, "intervals": {"acc": interval}})
    bar = groups["this encoder"]["ACC"]
    assert (bar.value, bar.interval, bar.seeds) == (0.9, (0.8, 1.0), [0.85, 0.95])


def test_a_profile_without_held_out_values_is_drawn_from_the_fitted_ones() -> None:
    stages = [{"tap": "a", "train": 1.0, "held_out": None}, {"tap": "b", "train": None, "held_out": None}]
    (profile,) = reading.profiles({"evidence": {"profile": {"measure": "mine", "stages": stages}}})
    assert [stage.tap for stage in profile[1]] == ["a"]
    assert profile_chart(*profile).startswith(b"<?xml")
