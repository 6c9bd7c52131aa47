"""Rows to tables: mean, spread and number of encoders, the paper's number beside ours."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from encoderguard.bench.auroc import auroc
from encoderguard.bench.notation import Sheet

__all__ = ["compared", "encoder_of", "rank_sheets", "sheets", "spread"]

_GROUP = ("pretrain", "attack", "task", "defense", "detector", "encoder", "x")
_RATES = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "overlap")
_NAMES = {
    "acc": "ACC %",
    "asr": "ASR % (target class excluded)",
    "asr_all": "ASR % (all)",
    "clean_acc": "clean ACC %",
    "clean_asr": "clean ASR %",
    "overlap": "neighbours kept %",
    "seconds": "seconds",
    "memory": "peak MiB",
}
Row = Mapping[str, Any]


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a result; failed rows are in them, named as failed."""
    made = []
    defended = [row for row in result["rows"] if "defense" in row["facts"]]
    if defended:
        made += [_defenses(defended, result["published"], result.get("records", {})), _ranks(defended)]
    scanned = [row for row in result["rows"] if "detector" in row["facts"]]
    if scanned:
        made += [_scores(scanned, result["published"]), _rates_of_detectors(scanned)]
    if result["kind"] == "profile":
        made.append(_profiles(result["rows"]))
    return made


def rank_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """The order of the defenses and the rates of the detectors over rows of any results."""
    defended = [row for row in rows if "defense" in row["facts"]]
    scanned = [row for row in rows if "detector" in row["facts"]]
    return [*([_ranks(defended)] if defended else []), *([_rates_of_detectors(scanned)] if scanned else [])]


def _grouped(rows: Sequence[Row], leave: Sequence[str] = ()) -> dict[tuple[tuple[str, Any], ...], list[Row]]:
    """Rows that differ in their seed (and in ``leave``) only, in the order of their first."""
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        facts = row["facts"]
        key = tuple((name, facts[name]) for name in _GROUP if name in facts and name not in leave)
        groups.setdefault(key, []).append(row)
    return groups


def _column(rows: Sequence[Row], name: str) -> list[float]:
    scale = 100 if name in _RATES else 1 / 2**20 if name == "memory" else 1
    return [scale * row["values"][name] for row in rows if row["values"].get(name) is not None]


def spread(values: Sequence[float]) -> str:
    """``mean ± standard deviation (n)``; a single value says that it is one."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} (n=1)"
    return f"{mean(values):.1f} ± {stdev(values):.1f} (n={len(values)})"


def compared(differences: Sequence[float]) -> str:
    """The mean of paired differences; within noise where its 95 % interval (Student's t) covers 0."""
    if not differences:
        return "-"
    difference, n = mean(differences), len(differences)
    if n < 2:
        return f"{difference:+.1f} (one encoder: noise unknown)"
    reach = float(t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    return f"{difference:+.1f}" + (" (within noise)" if abs(difference) <= reach else "")


def _differences(now: Sequence[Row], before: Sequence[Row]) -> list[float]:
    """ACC of each encoder after less before, in points."""
    start = {encoder_of(row): row["values"].get("acc") for row in before}
    pairs = [(row["values"].get("acc"), start.get(encoder_of(row))) for row in now]
    return [100 * (after - first) for after, first in pairs if after is not None and first is not None]


def encoder_of(row: Row) -> tuple[Any, ...]:
    """What tells the encoder of a row from that of another: the victim, if it is of a zoo, and the seed."""
    return row["facts"].get("victim"), row["facts"]["seed"]


def _clean_acc(rows: Sequence[Row], records: Mapping[str, Any]) -> list[float]:
    """In percent, of each clean encoder once: one stands behind many attacks."""
    found: dict[str, float] = {}
    for row in rows:
        if row["values"].get("clean_acc") is not None:
            key = row["records"].get("evaluate", "")
            record = records.get(key, {}).get("record", {})
            clean = (record.get("clean_encoder") or {}).get("fingerprint")
            found.setdefault(f"{clean or key} {row['facts']['seed']}", 100 * row["values"]["clean_acc"])
    return list(found.values())


def _defenses(
    given: Sequence[Row], published: Sequence[Mapping[str, Any]], records: Mapping[str, Any]
) -> Sheet:
    groups = _grouped(given)
    columns = ("acc", "asr", "asr_all", "clean_acc", "clean_asr", "overlap", "seconds", "memory")
    undefended = {
        tuple(p for p in key if p[0] not in ("defense", "x")): rows
        for key, rows in groups.items()
        if ("defense", "none") in key
    }
    rows = []
    for key, members in groups.items():
        facts = dict(key)
        before = undefended.get(tuple(p for p in key if p[0] not in ("defense", "x")), [])
        change = "" if facts["defense"] == "none" else compared(_differences(members, before))
        values = {name: _column(members, name) for name in columns}
        values["clean_acc"] = _clean_acc(members, records)
        rows.append(
            [
                *_words(facts, ("pretrain", "attack", "task", "defense")),
                *(spread(values[name]) for name in columns),
                change,
                _published(facts, published, ("acc", "asr")),
                _failures(members),
            ]
        )
    header = ["pre-training", "attack", "task", "defense", *(_NAMES[n] for n in columns)]
    return Sheet(
        title="Accuracy and attack success",
        header=[*header, "ACC lost or won", "paper ACC/ASR %", "failed"],
        rows=rows,
        note=(
            "Mean ± standard deviation over n encoders. Clean: the clean encoder, same trigger and probe; "
            "its ASR is one number for each attack. Within noise: the 95 % interval of the paired "
            "differences (Student's t) covers 0."
        ),
    )


def _ranks(rows: Sequence[Row]) -> Sheet:
    """Two orders of the defenses: by ASR above the clean encoder's, and by TrojAI's fidelity."""
    groups = _grouped(rows, leave=("pretrain", "attack", "task", "x"))
    measured = []
    for key, members in groups.items():
        known = [row["values"] for row in members if row["values"].get("asr") is not None]
        above = [100 * (v["asr"] - v["clean_asr"]) for v in known if v.get("clean_asr") is not None]
        fidelity = [v["fidelity"] for v in known if v.get("fidelity") is not None]
        measured.append((dict(key)["defense"], above, fidelity))
    by_asr = _places([(name, mean(above)) for name, above, _ in measured if above])
    by_fidelity = _places([(name, -mean(f)) for name, _, f in measured if f])
    table = [
        [name, by_asr.get(name, "-"), spread(above), by_fidelity.get(name, "-"), _two(fidelity)]
        for name, above, fidelity in measured
    ]
    table.sort(key=lambda row: (row[1] == "-", int(row[1]) if row[1] != "-" else 0))
    header = ["defense", "rank by ASR", "ASR above clean, points", "rank by fidelity", "TrojAI fidelity"]
    return Sheet(title="Ranks over all cases", header=header, rows=table)


def _places(values: Sequence[tuple[str, float]]) -> dict[str, str]:
    """Places from 1; equal values share one."""
    return {name: str(1 + sum(other < value for _, other in values)) for name, value in values}


def _two(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} (n={len(values)})" if values else "-"


def _scores(given: Sequence[Row], published: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = []
    for key, members in _grouped(given).items():
        facts = dict(key)
        known = [row["values"] for row in members if not row["failed"]]
        verdicts = [v["verdict"] for v in known]
        scores = [v["score"] for v in known if v["score"] is not None]
        rows.append(
            [
                *_words(facts, ("pretrain", "attack", "task", "detector", "encoder")),
                ", ".join(f"{score:.4f}" for score in scores) or "-",
                ", ".join(sorted({f"{verdicts.count(v)} {v}" for v in verdicts})) or "-",
                spread(_column(members, "seconds")),
                _published(facts, published, ("score",)),
                _failures(members),
            ]
        )
    header = ["pre-training", "attack", "task", "detector", "encoder", "scores", "verdicts", "seconds"]
    return Sheet(title="Scores and verdicts", header=[*header, "paper", "failed"], rows=rows)


def _rates_of_detectors(rows: Sequence[Row]) -> Sheet:
    """Per detector over all cases: the four counts, abstentions, and the area under the ROC curve."""
    table = []
    for key, members in _grouped(rows, leave=("pretrain", "attack", "task", "encoder", "x")).items():
        cases = {  # one clean encoder stands behind many attacks: it counts once
            row["records"]["scan"]: (row["facts"]["encoder"] == "backdoored", row["values"])
            for row in members
            if not row["failed"]
        }
        truth = [bad for bad, _ in cases.values()]
        said = [values["verdict"] for _, values in cases.values()]
        counts = [
            sum(bad is expected and verdict == word for bad, verdict in zip(truth, said, strict=True))
            for expected in (True, False)
            for word in ("backdoored", "clean", "inconclusive")
        ]
        table.append([dict(key)["detector"], *map(str, counts), _auroc(list(cases.values()))])
    header = ["detector", "TP", "FN", "bad, inconclusive", "FP", "TN", "clean, inconclusive"]
    return Sheet(
        title="Rates of the detectors",
        header=[*header, "AUROC [95 %]"],
        rows=table,
        note="AUROC of the scores with a bootstrap interval over encoders.",
    )


def _auroc(cases: Sequence[tuple[bool, Mapping[str, Any]]]) -> str:
    scores: dict[bool, list[float]] = {True: [], False: []}
    for bad, values in cases:
        if values["score"] is not None:
            scores[bad].append(values["score"] * (-1 if values["flagged"] == "below" else 1))
    area = auroc(scores[False], scores[True])
    if area is None:
        return "-"
    interval = f"[{area['low']:.3f}, {area['high']:.3f}]"
    return f"{area['value']:.3f} {interval} (n={len(scores[True]) + len(scores[False])})"


def _profiles(rows: Sequence[Row]) -> Sheet:
    table = []
    for row in rows:
        for name, profile in row["values"].get("profiles", {}).items():
            values = [f"{stage['held_out']:.3f}" for stage in profile["stages"]]
            table.append([*_words(row["facts"], ("pretrain", "attack", "task", "seed")), name, *values])
    stages = max((len(line) for line in table), default=5) - 5
    header = ["pre-training", "attack", "task", "seed", "measure", *(f"stage {i + 1}" for i in range(stages))]
    return Sheet(title="Dependence of the stages on the features", header=header, rows=table)


def _words(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [str(facts.get(name, "-")) for name in names]


def _published(
    facts: Mapping[str, Any], published: Sequence[Mapping[str, Any]], values: Sequence[str]
) -> str:
    """The paper's numbers for this case, or a dash: every key of an entry that is a fact must agree."""
    for entry in published:
        if all(facts[name] == entry[name] for name in _GROUP if name in entry and name in facts) and any(
            name in entry for name in values
        ):
            return "/".join(str(entry.get(name, "-")) for name in values)
    return "-"


def _failures(members: Sequence[Row]) -> str:
    return "; ".join(sorted({row["failed"] for row in members if row["failed"]}))
