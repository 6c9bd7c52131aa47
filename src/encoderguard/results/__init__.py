"""The versioned records: what a run was given, what it did and what it found. Needs no torch."""

from encoderguard.results.files import RESULT, parse_record, read_record, to_json, write_record
from encoderguard.results.records import (
    RECORDS,
    SCHEMA_VERSION,
    AttackRecord,
    DemoRecord,
    EncoderFacts,
    EvaluateRecord,
    FilterRecord,
    ImageFacts,
    PoisonRecord,
    PretrainRecord,
    PurifyRecord,
    Record,
    ScanRecord,
)

__all__ = [
    "RECORDS",
    "RESULT",
    "SCHEMA_VERSION",
    "AttackRecord",
    "DemoRecord",
    "EncoderFacts",
    "EvaluateRecord",
    "FilterRecord",
    "ImageFacts",
    "PoisonRecord",
    "PretrainRecord",
    "PurifyRecord",
    "Record",
    "ScanRecord",
    "parse_record",
    "read_record",
    "to_json",
    "write_record",
]
