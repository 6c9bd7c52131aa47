"""Turns a record and its arrays into the sections of a page, in reading order."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoderguard.report import reading
from encoderguard.report.bars import Bar, beta_chart, profile_chart, rates_chart
from encoderguard.report.blocks import Block, Gallery, Points, Section, Table, chart
from encoderguard.report.figures import COLOURS, Row, curve_chart, score_chart
from encoderguard.report.picture_blocks import examples, maps, triggers
from encoderguard.report.search_blocks import families, found, stages
from encoderguard.report.values import count, mapping, number, numbers, percent, sequence, short, text
from encoderguard.report.words import not_tested, tested

__all__ = ["sections"]

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray[np.generic]]
_MOST_CURVES = 24


def sections(record: Record, arrays: Arrays) -> list[Section]:
    """Every section for which the record or the arrays hold something."""
    builders: list[tuple[str, Callable[[Record, Arrays], list[Block]]]] = [
        ("Before and after", _rates),
        ("Score", _scores),
        ("Images with and without the trigger", examples),
        ("Recovered trigger", triggers),
        ("Families of triggers", families),
        ("What was found", found),
        ("Map of the features", maps),
        ("How much each stage knows of the final features", _profiles),
        ("Agreement with the encoder it was made from", _fidelity),
        ("Curves", _curves),
        ("What was tested, and what was not", _scope),
        ("Single runs", _runs),
        ("Time", stages),
        ("Evidence", _evidence),
    ]
    demo, set_up = record.get("job") == "demo", record.get("job") in ("demo", "poison")
    titles = {} if demo else {"Before and after": "Accuracy and attack success"}
    titles |= {"Evidence": "Set-up"} if set_up else {}
    alone = "Most suspicious images" if record.get("job") == "filter" else "Images"
    titles |= {} if "stamped" in arrays else {"Images with and without the trigger": alone}
    built = [(titles.get(title, title), build(record, arrays)) for title, build in builders]
    return [Section(title=title, blocks=blocks) for title, blocks in built if blocks]


def _rates(record: Record, arrays: Arrays) -> list[Block]:
    groups = reading.rate_groups(record)
    if not groups:
        return []
    names = list(dict.fromkeys(rate for bars in groups.values() for rate in bars))
    rows = [[name, *(_rate_cell(bars.get(rate)) for rate in names)] for name, bars in groups.items()]
    picture = chart(rates_chart(groups, reading.GROUP_COLOURS), "Bar chart of the rates in the table below")
    caption = (
        "ACC: test images classified correctly. ASR: images of other classes that the trigger sends to the "
        "target class. “All images” counts that class too. Dots: single seeds; lines: intervals."
    )
    return [Gallery(pictures=[picture], caption=caption), Table(header=["encoder", *names], rows=rows)]


def _rate_cell(bar: Bar | None) -> str:
    if bar is None or bar.interval is None:
        return percent(None if bar is None else bar.value)
    low, high = bar.interval
    return f"{percent(bar.value)} ({100 * low:.1f} to {100 * high:.1f})"


def _score_rows(record: Record) -> list[Row]:
    entries = {name: mapping(record.get(name)) for name in reading.ENCODERS}
    rows = []
    for name, entry in entries.items():
        score = number(entry.get("score"))
        values = numbers(entry.get("score_seeds")) or ([] if score is None else [score])
        if values:
            rows.append(Row(name=name, scores=values, colour=COLOURS[name], strong=True))
    own = number(record.get("score"))
    if own is not None:
        rows.append(Row(name="this encoder", scores=[own], colour=COLOURS["backdoored"], strong=True))
    restarts = reading.restart_scores(record)
    if restarts:
        rows.append(Row(name="its single restarts", scores=restarts, colour=COLOURS["neutral"]))
    known = [score for _, score in reading.known_clean(record)]
    if known:
        rows.append(Row(name="known clean encoders", scores=known, colour=COLOURS["clean"]))
    return rows


def _scores(record: Record, arrays: Arrays) -> list[Block]:
    rows = _score_rows(record)
    if not rows:
        return []
    parts = [record, *(mapping(record.get(name)) for name in reading.ENCODERS)]
    threshold = next((t for t in (number(part.get("threshold")) for part in parts) if t is not None), None)
    side = next((s for s in map(reading.flagged_side, parts) if s), None)
    known, clean_from = reading.known_clean(record), number(reading.lookup(record, "clean_from"))
    svg = score_chart(rows, threshold, side, clean_from)
    caption = "The shaded side of the threshold is flagged. " if side and threshold is not None else ""
    if clean_from is not None and threshold is not None and clean_from != threshold:
        caption += f"Between it and {short(clean_from)}, in grey, a score carries no verdict. "
    if not known and record.get("job") == "scan":
        caption += "The record holds no known clean encoder to compare with, so the margin cannot be judged."
    blocks: list[Block] = [Gallery(pictures=[chart(svg, "Scores against the threshold")], caption=caption)]
    verdicts = [[name, text(part.get("verdict")), text(part.get("score"))] for name, part in _judged(record)]
    if verdicts:
        blocks.append(Table(header=["encoder", "verdict", "score"], rows=verdicts))
    if any(name and not name.isdigit() for name, _ in known):
        rows_known = [[name, short(score)] for name, score in known]
        blocks.append(Table(header=["known clean encoder", "score"], rows=rows_known))
    return blocks


def _judged(record: Record) -> list[tuple[str, dict[str, Any]]]:
    entries = [(name, mapping(record.get(name))) for name in reading.ENCODERS]
    return [(name, entry) for name, entry in entries if entry.get("verdict")]


def _profiles(record: Record, arrays: Arrays) -> list[Block]:
    panels = [
        chart(profile_chart(measure, clean, triggered), f"{measure} of each stage with the final features")
        for measure, clean, triggered in reading.profiles(record)
    ]
    taps, weights = reading.betas(record)
    if weights:
        panels.append(chart(beta_chart(taps, weights), "Weight of each stage in the attention loss"))
    if not panels:
        return []
    caption = (
        "Dependence of each stage on the final features, from shallow to deep. Points are held-out values "
        "with their spread over seeds; the grey band is the same measure on shuffled pairs, where there is "
        "nothing to find. Weights β say how much of each stage the student is asked to copy."
    )
    return [Gallery(pictures=panels, shape="charts", caption=caption)]


def _fidelity(record: Record, arrays: Arrays) -> list[Block]:
    names = {
        "cosine": "mean cosine of the features",
        "cka": "linear CKA",
        "neighbour_overlap": "share of nearest neighbours kept",
    }
    told = mapping(reading.lookup(record, "fidelity"))
    amount = number(told.pop("n", None))
    on = text(told.pop("source", None)) or "clean images"
    values = {key: number(item) for key, item in told.items()}
    rows = [[names.get(key, key), short(item)] for key, item in values.items() if item is not None]
    caption = (
        f"On {on}{'' if amount is None else f' ({int(amount):,})'}, without labels; 1 is perfect agreement."
    )
    return [Table(rows=rows, caption=caption)] if rows else []


def _curves(record: Record, arrays: Arrays) -> list[Block]:
    found = list(reading.curves(record).items())
    panels = [chart(curve_chart(name, lines), f"Curve of {name}") for name, lines in found[:_MOST_CURVES]]
    more = len(found) - len(panels)
    caption = "One value per epoch or logged step." + (
        f" {count(more, 'curve')} more in the record." if more else ""
    )
    return [Gallery(pictures=panels, shape="curves", caption=caption)] if panels else []


def _scope(record: Record, arrays: Arrays) -> list[Block]:
    if record.get("job") != "scan" or not record.get("verdict"):
        return []
    return [
        Points(title="Tested", items=tested(record)),
        Points(title="Not tested", items=not_tested(record)),
    ]


def _runs(record: Record, arrays: Arrays) -> list[Block]:
    """One row per run and encoder."""
    rows: list[dict[str, str]] = []
    for run in map(mapping, sequence(record.get("runs"))):
        cases = {name: mapping(run.get(name)) for name in reading.ENCODERS}
        seed = {"seed": text(run.get("seed"))}
        told = [seed | {"encoder": name} | _measured(case) for name, case in cases.items() if case]
        rows += told or [_measured(run)]
    header = list(dict.fromkeys(key for row in rows for key in row))[:12]
    table = Table(header=header, rows=[[row.get(key, "") for key in header] for row in rows])
    return [table] if header else []


def _measured(values: Mapping[str, Any]) -> dict[str, str]:
    rates = {reading.RATES[key]: percent(number(values[key])) for key in values if key in reading.RATES}
    return rates | {key: item for key, item in _flat(values).items() if key not in reading.RATES}


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Single values, also those one level down: ``{"clean": {"acc": .9}}`` becomes ``clean acc``."""
    found: dict[str, str] = {}
    for key, item in values.items():
        nested = {f"{key} {inner}": value for inner, value in mapping(item).items()} or {key: item}
        found |= {name: text(value) for name, value in nested.items() if isinstance(value, str | int | float)}
    return found


def _evidence(record: Record, arrays: Arrays) -> list[Block]:
    """Single values of the evidence, and what a demo or an attack was set up with."""
    values = {k: v for k, v in mapping(record.get("evidence")).items() if not isinstance(v, dict)}
    for key in ("target", "target_name", "trigger", "recipe", "rate"):
        values |= {key: record[key]} if record.get(key) is not None else {}
    rows = [[key, value] for key, value in _flat(values).items() if value and key != "reason"]
    return [Table(rows=rows)] if rows else []
