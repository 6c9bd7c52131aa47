import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from encoderguard.errors import UsageError
from encoderguard.provenance import cpu_name, forget_peak_memory, peak_memory_bytes, source_facts, versions
from encoderguard.results import (
    RECORDS,
    RESULT,
    SCHEMA_VERSION,
    EvaluateRecord,
    ImageFacts,
    Record,
    ScanRecord,
    parse_record,
    read_record,
    to_json,
    write_record,
)

OLD = Path(__file__).parent / "data" / "record-scan-v1.json"


@pytest.mark.parametrize(("job", "kind"), RECORDS.items())
def test_a_record_survives_json(job: str, kind: type[Record]) -> None:
    images = ImageFacts(spec="digits", name="digits", count=3, available=9, digest="d", height=8, width=8)
    record = kind(
        job=job, seed=7, settings={"lr": 1e-3, "sizes": [1, 2], "none": None}, images=images, warnings=["w"]
    )
    assert parse_record(to_json(record)) == record


def test_numbers_that_are_no_numbers_become_null_and_are_named() -> None:
    evidence: Any = {"curve": [1.0, math.nan, (math.inf,)], "deep": {"low": -math.inf}}
    record = ScanRecord(score=math.nan, threshold=0.1, evidence=evidence)
    assert record.score is None
    assert record.evidence == {"curve": [1.0, None, [None]], "deep": {"low": None}}
    assert record.nonfinite == {
        "score": "nan",
        "evidence.curve.1": "nan",
        "evidence.curve.2.0": "inf",
        "evidence.deep.low": "-inf",
    }
    text = to_json(record)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parse_record(text) == record


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        ScanRecord(verdit="clean")  # type: ignore[call-arg]


def test_a_fraction_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        EvaluateRecord(acc=99.1)


def test_a_record_of_the_first_version_is_still_read() -> None:
    record = read_record(OLD)
    assert isinstance(record, ScanRecord)
    assert (record.verdict, record.score, record.threshold) == ("backdoored", 0.03125, 0.1)
    assert record.encoder is not None
    assert record.encoder.width == 16
    assert record.images is not None
    assert (record.images.count, record.images.available) == (1000, 50000)


def changed(**fields: object) -> str:
    return json.dumps(json.loads(OLD.read_text()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object with schema_version and job"),
        ("[]", "expected a JSON object with schema_version and job"),
        (changed(schema_version=SCHEMA_VERSION + 1), "schema version 2, which is newer.*update EncoderGuard"),
        (changed(job="bake"), "unknown job 'bake'; known are attack, .*scan"),
        (changed(verdict="fine"), "not a valid scan record: verdict: Input should be"),
        (changed(colour="red"), "not a valid scan record: colour: Extra inputs"),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_record(text)


def test_a_record_is_found_in_its_folder(tmp_path: Path) -> None:
    record = ScanRecord(score=0.5)
    assert write_record(record, tmp_path) == tmp_path / RESULT
    assert read_record(tmp_path) == record == read_record(tmp_path / RESULT)
    with pytest.raises(UsageError, match="There is no record"):
        read_record(tmp_path / "elsewhere")


def test_provenance_knows_this_machine() -> None:
    assert {"python", "torch", "numpy"} <= set(versions())
    assert set(source_facts()) == {"versions", "commit", "dirty", "platform", "cpu"}
    peak = peak_memory_bytes()
    assert peak is None or peak > 10 * 2**20
    assert cpu_name() != ""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps one peak only")
def test_the_peak_of_memory_is_that_of_one_job() -> None:
    ballast = bytearray(200 << 20)
    before = peak_memory_bytes()
    del ballast
    forget_peak_memory()
    after = peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after < before - (100 << 20)
