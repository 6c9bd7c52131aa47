"""The jobs that the command line and Python code call; each returns its record and what it made."""

from encoderguard.jobs.defending import PURIFY_IMAGES, SCAN_IMAGES, PurifyResult, ScanResult, purify, scan
from encoderguard.jobs.judging import EvaluateResult, evaluate
from encoderguard.jobs.options import JobOptions
from encoderguard.jobs.training import AttackResult, PretrainResult, attack, pretrain

__all__ = [
    "PURIFY_IMAGES",
    "SCAN_IMAGES",
    "AttackResult",
    "EvaluateResult",
    "JobOptions",
    "PretrainResult",
    "PurifyResult",
    "ScanResult",
    "attack",
    "evaluate",
    "pretrain",
    "purify",
    "scan",
]
