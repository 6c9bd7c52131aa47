"""Finds in a record what the page shows; whatever is missing or malformed is simply not there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoderguard.report.bars import Bar, Stage
from encoderguard.report.figures import COLOURS
from encoderguard.report.pixels import embedding
from encoderguard.report.values import mapping, number, numbers, sequence, text

__all__ = [
    "ENCODERS",
    "GROUP_COLOURS",
    "RATES",
    "Map",
    "betas",
    "curves",
    "embedding_maps",
    "flagged_side",
    "known_clean",
    "lookup",
    "method_name",
    "named_scores",
    "profiles",
    "rate_groups",
    "restart_scores",
]

Profile = tuple[str, list[Stage], list[Stage]]
Map = tuple[str, NDArray[np.float64] | None, NDArray[np.float64] | None]

ENCODERS = ("clean", "backdoored", "purified")
RATES = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR, all images"}
GROUP_COLOURS = {
    **{name: COLOURS[name] for name in ENCODERS},
    "clean encoder": COLOURS["clean"],
    "before": COLOURS["backdoored"],
    "after": COLOURS["purified"],
    "this encoder": COLOURS["neutral"],
}
_MAPS = {
    "embedding": "this encoder",
    "embedding_before": "before",
    "embedding_after": "after",
    **{f"embedding_{name}": name for name in ENCODERS},
}
_MEASURES = {
    "mine": "MINE (nats)",
    "cka": "debiased linear CKA",
    "gaussian": "Gaussian information (nats)",
}
_STATISTICS = {
    "count",
    "n",
    "mean",
    "std",
    "spread",
    "min",
    "max",
    "median",
    "margin",
    "threshold",
    "quantile",
}


def lookup(record: Mapping[str, Any], key: str) -> Any:
    """A value of the record itself or, failing that, of its evidence."""
    value = record.get(key)
    return mapping(record.get("evidence")).get(key) if value is None else value


def method_name(record: Mapping[str, Any]) -> str:
    """The method that ran, under whichever of its names the record has."""
    for key in ("method", "detector", "defense", "attack"):
        if isinstance(record.get(key), str) and record[key]:
            return str(record[key])
    return ""


def flagged_side(record: Mapping[str, Any]) -> str | None:
    """On which side of the threshold a score is flagged: told by the record, or seen from its verdict."""
    side = lookup(record, "flagged")
    if side in ("below", "above"):
        return str(side)
    score, threshold = number(record.get("score")), number(record.get("threshold"))
    verdict = record.get("verdict")
    if threshold is None:
        return None
    if score is None or score == threshold or verdict not in ("backdoored", "clean"):
        known = [score > threshold for _, score in known_clean(record)]
        return None if not known or any(known) != all(known) else "below" if all(known) else "above"
    return "below" if (score < threshold) == (verdict == "backdoored") else "above"


def known_clean(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Names and scores of the clean encoders that the verdict was compared with."""
    entries = lookup(record, "reference") or lookup(record, "clean_references")
    return named_scores(entries)


def restart_scores(record: Mapping[str, Any]) -> list[float]:
    """One score per restart that found something."""
    entries = sequence(lookup(record, "restarts"))
    own = ("score", "smallest_mask_on_a_batch")
    found = [
        number(e) if not isinstance(e, dict) else next((number(e[k]) for k in own if k in e), None)
        for e in entries
    ]
    return [score for score in found if score is not None]


def named_scores(value: object, name: str = "") -> list[tuple[str, float]]:
    """Scores of known encoders, from a number, a list, or a dictionary by name, nested or not."""
    score = number(value)
    if score is not None:
        return [(name, score)]
    if isinstance(value, list | tuple):
        return [
            pair for place, item in enumerate(value, 1) for pair in named_scores(item, name or str(place))
        ]
    entries = mapping(value)
    if "scores" in entries:
        return named_scores(entries["scores"])
    if "score" in entries:
        parts = [text(entries.get(key)) for key in ("name", "encoder", "source", "images")]
        return named_scores(entries["score"], ", ".join(filter(None, parts)) or name)
    kept = [
        (key, item) for key, item in entries.items() if key not in _STATISTICS and not isinstance(item, bool)
    ]
    return [pair for key, item in kept for pair in named_scores(item, key)]


def curves(record: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Training curves by name, each of one or several lines of two points or more.

    Several lines come from a list of lists, or from names such as ``loss/0`` and ``loss/1``.
    """
    history = lookup(record, "history") or lookup(record, "curves")
    if isinstance(history, list):
        steps = [mapping(step) for step in history]
        names = list(dict.fromkeys(name for step in steps for name in step))
        history = {name: [step.get(name) for step in steps] for name in names}
    found: dict[str, list[list[float]]] = {}
    for name, values in mapping(history).items():
        nested = [numbers(line) for line in sequence(values) if isinstance(line, list | tuple)]
        lines = [line for line in [*nested, numbers(values)] if len(line) > 1]
        if lines:
            stem, _, restart = name.rpartition("/")
            found.setdefault(stem if restart.isdigit() else name, []).extend(lines)
    return found


def _bar(source: Mapping[str, Any], key: str) -> Bar | None:
    ends = mapping(source.get("intervals")).get(key)
    seeds = numbers(source.get(f"{key}_seeds")) or numbers(mapping(ends).get("per_seed"))
    value = number(source.get(key))
    if value is None:
        if not seeds:
            return None
        value = sum(seeds) / len(seeds)
    if isinstance(ends, dict):
        ends = [ends.get("low"), ends.get("high")]
    interval = numbers(ends)
    return Bar(value=value, interval=(interval[0], interval[1]) if len(interval) == 2 else None, seeds=seeds)


def _bars(source: Mapping[str, Any], prefix: str = "") -> dict[str, Bar]:
    pairs = [(label, _bar(source, prefix + key)) for key, label in RATES.items()]
    return {label: bar for label, bar in pairs if bar is not None}


def rate_groups(record: Mapping[str, Any]) -> dict[str, dict[str, Bar]]:
    """ACC and ASR as fractions, by encoder; encoders without any are left out."""
    groups = {"clean encoder": _bars(record, "clean_"), "this encoder": _bars(record)}
    groups |= {name: _bars(mapping(lookup(record, name))) for name in (*ENCODERS, "before", "after")}
    return {name: bars for name, bars in groups.items() if bars}


def _stages(value: object) -> list[Stage]:
    stages = []
    for place, item in enumerate(map(mapping, sequence(mapping(value).get("stages"))), 1):
        held_out, train = number(item.get("held_out")), number(item.get("train"))
        if held_out is not None or train is not None:
            stages.append(
                Stage(
                    tap=text(item.get("tap")) or f"stage {place}",
                    held_out=held_out,
                    spread=abs(number(item.get("spread")) or 0.0),
                    train=train,
                    null=number(item.get("null")),
                    null_spread=abs(number(item.get("null_spread")) or 0.0),
                )
            )
    return stages


def _by_measure(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Stage]]:
    found: dict[str, list[Stage]] = {}
    for name in names:
        value = lookup(record, name)
        for item in sequence(value) or [value]:
            stages = _stages(item)
            if stages:
                measure = text(mapping(item).get("measure")) or "dependence"
                found.setdefault(_MEASURES.get(measure, measure), stages)
    return found


def profiles(record: Mapping[str, Any]) -> list[Profile]:
    """Dependence profiles as (measure, stages on clean inputs, stages on triggered inputs)."""
    clean = _by_measure(record, ("profiles", "profile"))
    triggered = _by_measure(record, ("profiles_triggered", "profile_triggered"))
    measures = dict.fromkeys([*clean, *triggered])
    return [(measure, clean.get(measure, []), triggered.get(measure, [])) for measure in measures]


def betas(record: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """The stage weights with the names of their stages (both empty if there are none)."""
    value = lookup(record, "beta")
    if isinstance(value, dict):
        pairs = [(key, number(item)) for key, item in mapping(value).items()]
        known = [(key, item) for key, item in pairs if item is not None]
        return [key for key, _ in known], [item for _, item in known]
    weights = numbers(value)
    taps = next((stages for _, stages, _ in profiles(record) if len(stages) == len(weights)), [])
    return [stage.tap for stage in taps] or [f"stage {k}" for k in range(1, len(weights) + 1)], weights


def embedding_maps(arrays: Mapping[str, NDArray[np.generic]]) -> list[Map]:
    """Two-dimensional maps as (title, clean points, triggered points)."""
    found = [(t, embedding(arrays, key), embedding(arrays, f"{key}_triggered")) for key, t in _MAPS.items()]
    return [entry for entry in found if entry[1] is not None or entry[2] is not None]
