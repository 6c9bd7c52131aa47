"""What a bench leaves behind: rows of numbers, and the records that they come from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encoderguard.bench.engine import Outcome
from encoderguard.bench.plan import Cell, Plan
from encoderguard.bench.store import Store, sweep
from encoderguard.errors import UsageError
from encoderguard.fidelity import trojai_fidelity
from encoderguard.storage import prepare_folder, write_text

__all__ = [
    "RESULT",
    "collect",
    "comparable",
    "numbers",
    "read_result",
    "recomputed",
    "seconds_of",
    "write_result",
]

RESULT = "bench.json"
_SCHEMA = 1
_POINTS = 200
"""Of a map that are kept."""
_INCIDENTAL = {"created", "seconds", "method_seconds", "commit", "dirty", "spec", "folder"}
_INCIDENTAL |= {"resumed", "source", "peak_memory_bytes", "peak_device_memory_bytes"}


def collect(plan: Plan, store: Store, outcome: Outcome) -> dict[str, Any]:
    """The result as JSON values; ``records`` holds each cell's record by key.

    Truth and findings meet here, after every detector and defense is done.
    """
    suite = plan.suite
    rows, records = [], dict[str, Any]()
    for row in plan.rows:
        failed = next((outcome.failed[c] for c in row.cells.values() if c in outcome.failed), None)
        keys = {role: cell.key for role, cell in row.cells.items()}
        if failed is None:
            for cell in row.cells.values():
                records[cell.key] = _record(cell, store)
                if suite.maps and cell.job == "evaluate":
                    records[cell.key]["map"] = _map(store.folder(cell))
        held = {} if failed else numbers({role: records[key] for role, key in keys.items()})
        rows.append({"facts": row.facts, "values": held, "records": keys, "failed": failed})
    facts = suite.model_dump(
        mode="json", include={"name", "title", "paper", "item", "kind", "expected", "axis"}
    )
    return {
        "schema_version": _SCHEMA,
        **facts,
        "size": plan.size,
        "published": [dict(entry) for entry in suite.published],
        "slips": list(suite.slips),
        "missing": list(plan.missing),
        "rows": _with_fidelity(rows),
        "records": records,
    }


def _record(cell: Cell, store: Store) -> dict[str, Any]:
    facts = store.facts(cell)
    return {"identity": facts["identity"], "record": facts["record"]}


def _map(folder: Path) -> dict[str, list[list[float]]]:
    """Places of some test images in feature space, as the evaluation drew them."""
    kinds = {"embedding": "clean", "embedding_triggered": "triggered"}
    with np.load(folder / "arrays.npz") as arrays:
        return {
            kind: np.round(arrays[name][:_POINTS].astype(float), 4).tolist()
            for name, kind in kinds.items()
            if name in arrays
        }


def numbers(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values of one row, from the records of its cells by role."""
    found: dict[str, Any] = {}
    for role, held in records.items():
        record = held["record"]
        if role == "evaluate":
            found |= {n: record.get(n) for n in ("acc", "asr", "asr_all", "clean_acc", "clean_asr")}
            found |= {"map": held["map"]} if "map" in held else {}
        elif role == "purify":
            found |= {"seconds": seconds_of(record), "memory": record.get("peak_memory_bytes")}
            found["overlap"] = (record.get("fidelity") or {}).get("neighbour_overlap")
        elif role == "scan":
            found |= {n: record.get(n) for n in ("verdict", "score", "threshold", "p_value")}
            found["seconds"] = seconds_of(record)
            found["flagged"] = (record.get("evidence") or {}).get("flagged", "below")
        elif role == "profile":
            found["profiles"] = record["profiles"]
    return found


def seconds_of(record: Mapping[str, Any]) -> float | None:
    """Of the method; of a resumed run only the last part is known, which is no speed."""
    return None if record.get("resumed") else record.get("method_seconds")


def comparable(facts: Any) -> Any:
    """A record, or any part of it, without what differs between two runs of one cell.

    That is: when, how long, with how much memory, of which commit and in which folder; a bundle's digest too,
    since its provenance names those. The fingerprints of the weights stay.
    """
    if isinstance(facts, Mapping):
        kept = {name: comparable(value) for name, value in facts.items() if name not in _INCIDENTAL}
        return kept | ({"outputs": sorted(kept["outputs"])} if isinstance(kept.get("outputs"), dict) else {})
    if isinstance(facts, list | tuple):
        return [comparable(value) for value in facts]
    return facts


def _with_fidelity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NIST TrojAI's fidelity of each defense, against the undefended row of the same case and seed."""

    def case(row: dict[str, Any]) -> str:
        facts = {k: v for k, v in row["facts"].items() if k not in ("defense", "x")}
        return json.dumps(facts, sort_keys=True)

    before = {case(row): row["values"] for row in rows if row["facts"].get("defense") == "none"}
    for row in rows:
        first, now = before.get(case(row)), row["values"]
        if first and now.get("asr") is not None and first.get("asr") is not None:
            now["fidelity"] = trojai_fidelity(
                asr_before=first["asr"], asr_after=now["asr"], acc_before=first["acc"], acc_after=now["acc"]
            )
    return rows


def _records_of(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """By role, the records that a row names. Raises KeyError if one is not there."""
    return {role: result["records"][key] for role, key in row["records"].items()}


def recomputed(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows again, every value taken from the records. Raises KeyError for a record that is missing."""
    rows = [
        {**row, "values": {} if row["failed"] else numbers(_records_of(result, row))}
        for row in result["rows"]
    ]
    return _with_fidelity(rows)


def write_result(result: Mapping[str, Any], folder: Path) -> None:
    """``bench.json`` with the rows, and ``records/KEY.json`` for each cell: small files, made for review."""
    prepare_folder(folder / "records")
    for place in (folder, folder / "records"):
        sweep(place)
    known = {f"{key}.json" for key in result["records"]}
    for path in (folder / "records").glob("*.json"):
        if path.name not in known:
            path.unlink()
    for key, record in result["records"].items():
        write_text(folder / "records" / f"{key}.json", _json(record))
    write_text(folder / RESULT, _json({k: v for k, v in result.items() if k != "records"}))


def read_result(folder: Path) -> dict[str, Any]:
    """What ``write_result`` wrote.

    Raises:
        UsageError: the folder holds no result, or one of another version, or a broken file.
    """
    try:
        held: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if held["schema_version"] != _SCHEMA:
            raise UsageError(
                f"{folder / RESULT} has schema version {held['schema_version']}, expected {_SCHEMA}."
            )
        held["records"] = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((folder / "records").glob("*.json"))
        }
    except OSError:
        raise UsageError(f"{folder} holds no {RESULT}; give a folder that 'bench' wrote.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds a broken result ({type(error).__name__}: {error}).") from None
    return held


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
