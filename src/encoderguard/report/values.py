"""Reading a record that may lack anything, and writing numbers the way a reader expects them."""

import json
from typing import Any

__all__ = [
    "count",
    "duration",
    "mapping",
    "number",
    "numbers",
    "percent",
    "points",
    "sequence",
    "short",
    "size",
    "text",
]

_DRAWABLE = 1e30


def mapping(value: object) -> dict[str, Any]:
    """``value`` if it is a dictionary, else an empty one; keys become strings."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """``value`` if it is a list or tuple, else an empty list."""
    return list(value) if isinstance(value, list | tuple) else []


def number(value: object) -> float | None:
    """A finite number that can be drawn, or None for everything else (booleans too)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if abs(result) < _DRAWABLE else None


def numbers(value: object) -> list[float]:
    """The finite numbers of a list, in order."""
    return [item for item in map(number, sequence(value)) if item is not None]


def text(value: object) -> str:
    """One line for any JSON value; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def short(value: float) -> str:
    """Four significant digits, without trailing zeros."""
    return f"{value:.4g}"


def count(amount: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``, ``1,024 images``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal and a space that does not break, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def points(value: float) -> str:
    """A difference of fractions as signed percentage points."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(amount: float) -> str:
    """A number of bytes as MiB or GiB."""
    return f"{amount / 2**30:.2f} GiB" if abs(amount) >= 2**30 else f"{amount / 2**20:.0f} MiB"
