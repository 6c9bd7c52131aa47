"""The jobs that the command line and Python code call; each returns its record and what it made."""

from encoderguard.jobs.defending import (
    PURIFY_IMAGES,
    SCAN_IMAGES,
    PurifyResult,
    ScanResult,
    detector_for,
    purify,
    scan,
    with_references,
)
from encoderguard.jobs.filtering import FILTER_TOP, FilterResult, filter_images
from encoderguard.jobs.judging import EvaluateResult, evaluate
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.poisoning import PoisonResult, poison
from encoderguard.jobs.training import AttackResult, PretrainResult, attack, pretrain

__all__ = [
    "FILTER_TOP",
    "PURIFY_IMAGES",
    "SCAN_IMAGES",
    "AttackResult",
    "EvaluateResult",
    "FilterResult",
    "JobOptions",
    "PoisonResult",
    "PretrainResult",
    "PurifyResult",
    "ScanResult",
    "attack",
    "detector_for",
    "evaluate",
    "filter_images",
    "poison",
    "pretrain",
    "purify",
    "scan",
    "with_references",
]
