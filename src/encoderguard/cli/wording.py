"""What a finished job says to a person. A verdict is a behavioural indicator; nothing is ever called safe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from encoderguard.report.words import banner, not_tested, summary, tested
from encoderguard.results import Record

__all__ = ["describe"]


def describe(record: Record) -> str:
    """A few lines: what came out, what was and was not looked at, and where the files are."""
    data = record.model_dump(mode="json")
    lines = list(_scan(data)) if record.job == "scan" else [summary(data)]
    if record.folder is not None:
        where = Path(record.folder)
        lines += [f"Encoder: {where / name}" for name in record.outputs if name == "encoder.safetensors"]
        lines += [f"Images: {where / name}" for name in record.outputs if name == "poisoned.npz"]
        lines += [f"Ranking: {where / name}" for name in record.outputs if name == "ranking.json"]
        lines += [f"Kept: {where / name}" for name in record.outputs if name == "kept.json"]
        lines += [f"Trigger: {where / name}" for name in record.outputs if name.endswith("trigger.json")]
        lines += [f"Report: {where / record.report}"] if record.report else []
    return "\n".join(line for line in lines if line)


def _scan(data: dict[str, Any]) -> Iterator[str]:
    found = banner(data)
    if found is None:
        return
    yield f"{found.title} ({found.verdict})."
    yield found.score + _margin(data)
    reason = data["evidence"].get("reason")
    yield f"Reason: {reason}." if isinstance(reason, str) else ""
    yield found.meaning
    yield from _listed("Tested", tested(data))
    yield from _listed("Not tested", not_tested(data))


def _margin(data: dict[str, Any]) -> str:
    score, threshold = data["score"], data["threshold"]
    if score is None or not threshold:
        return ""
    return f", score / threshold = {score / threshold:.2f}"


def _listed(title: str, sentences: list[str]) -> Iterator[str]:
    yield f"{title}:"
    yield from (f"  - {sentence}" for sentence in sentences)
