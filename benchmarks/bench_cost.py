"""What a benchmark of many encoders costs: cells, core hours and bytes, from the cells of a finished run.

Seconds and bytes of a cell are medians by kind of job over the store. The engine's own cost of a cell is
measured here with cells that compute nothing. A case is one backdoored encoder: attacked, scanned by each
detector, purified by each defense, evaluated before and after; some of them share a clean encoder, which is
scanned too.

    encoderguard bench run all --size tiny --out runs/bench-tiny
    python benchmarks/bench_cost.py --store runs/bench-tiny/store
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from encoderguard.bench.engine import run_cells
from encoderguard.bench.plan import Cell
from encoderguard.bench.store import CELL, Store
from encoderguard.provenance import source_facts
from encoderguard.run import StopSignal
from encoderguard.storage import write_text

RESULTS = Path(__file__).parent / "results"
KINDS = ("pretrain", "attack", "scan", "purify", "evaluate")


class Nothing:
    """A backend whose cells are finished as soon as they are submitted."""

    at_once = 2

    def __init__(self, store: Store) -> None:
        self.store = store

    def submit(self, cell: Cell) -> Cell:
        self.store.folder(cell).mkdir(parents=True)
        self.store.finish(cell, {"job": cell.job})
        return cell

    def finished(self, handles: Iterable[Cell], seconds: float) -> list[tuple[Cell, str | None, bool]]:
        return [(cell, None, False) for cell in handles]

    def close(self) -> None:
        pass


def engine_seconds(encoders: int) -> dict[str, float]:
    """The engine's cost of one cell, first computed and then found in the store."""
    cells: list[Cell] = []
    for number in range(encoders):
        clean = Cell(job="pretrain", method="simclr", settings={}, seed=number)
        suspect = Cell(job="attack", method="badencoder", settings={}, seed=number, needs={"encoder": clean})
        needs = {"encoder": suspect, "clean_encoder": clean, "trigger": suspect}
        judged = Cell(job="evaluate", method="linear", settings={}, seed=number, needs=needs)
        cells += [clean, suspect, judged]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("computed", "kept"):
            began = time.perf_counter()
            store = Store(Path(folder))
            run_cells(cells, store, lambda s=store: Nothing(s), progress=lambda *_: None, stop=StopSignal())  # type: ignore[misc]
            found[name] = (time.perf_counter() - began) / len(cells)
    return found


def measured(store: Path) -> dict[str, dict[str, Any]]:
    """By kind of job: medians over the cells of a store."""
    held: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(store.glob(f"cells/*/*/{CELL}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        record, identity = facts["record"], facts["identity"]
        if record.get("seconds") is None:  # no job of its own, such as an encoder that was taken from a zoo
            continue
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        held.setdefault(identity["job"], []).append(
            {
                "method": identity["method"],
                "seconds": record["seconds"],
                "method_seconds": record["method_seconds"],
                "bytes": size,
            }
        )
    return {job: _summary(held[job]) for job in KINDS if job in held}


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str, chosen: list[dict[str, Any]]) -> float:
        return float(statistics.median(cell[name] for cell in chosen))

    methods = sorted({cell["method"] for cell in cells})
    by_method = {name: [cell for cell in cells if cell["method"] == name] for name in methods}
    return {
        "cells": len(cells),
        "seconds": median("seconds", cells),
        "method_seconds": median("method_seconds", cells),
        "most_seconds": max(cell["seconds"] for cell in cells),
        "bytes": median("bytes", cells),
        "by_method": {
            name: {
                "cells": len(chosen),
                "seconds": median("seconds", chosen),
                "bytes": median("bytes", chosen),
            }
            for name, chosen in by_method.items()
        },
    }


def grid(encoders: int, *, detectors: int, defenses: int, sharing: int) -> dict[str, int]:
    """Cells by kind for so many backdoored encoders, ``sharing`` of which have one clean encoder."""
    clean = math.ceil(encoders / sharing)
    return {
        "pretrain": clean,
        "attack": encoders,
        "scan": detectors * (encoders + clean),
        "purify": defenses * encoders,
        "evaluate": (1 + defenses) * encoders,
    }


def extrapolated(kinds: dict[str, dict[str, Any]], cells: dict[str, int], engine: float) -> dict[str, Any]:
    """Cost of a grid; a kind that was not measured is an error."""
    total = sum(cells.values())
    return {
        "cells": total,
        "by_kind": cells,
        "core_seconds": sum(kinds[job]["seconds"] * count for job, count in cells.items()) + engine * total,
        "engine_seconds": engine * total,
        "bytes": sum(kinds[job]["bytes"] * count for job, count in cells.items()),
    }


def markdown(record: dict[str, Any]) -> str:
    """The tables of docs/bench.md."""
    lines = [
        "| job | cells measured | median seconds | of these the method's | median bytes |",
        "|---|---|---|---|---|",
    ]
    for job, kind in record["kinds"].items():
        lines.append(
            f"| {job} | {kind['cells']} | {kind['seconds']:.1f} | {kind['method_seconds']:.1f} "
            f"| {kind['bytes'] / 1e6:.2f} MB |"
        )
    lines += [
        "",
        "| encoders | cells | core hours | of these the engine's | store |",
        "|---|---|---|---|---|",
    ]
    for encoders, cost in record["grids"].items():
        lines.append(
            f"| {int(encoders):,} | {cost['cells']:,} | {cost['core_seconds'] / 3600:.2f} "
            f"| {cost['engine_seconds'] / 3600:.4f} | {cost['bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="of a finished run")
    parser.add_argument("--encoders", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--detectors", type=int, default=1)
    parser.add_argument("--defenses", type=int, default=1)
    parser.add_argument("--sharing", type=int, default=10, help="backdoored encoders for one clean encoder")
    parser.add_argument("--engine-encoders", type=int, default=500, help="cases that compute nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_cost.json")
    options = parser.parse_args()
    kinds = measured(options.store)
    if lacking := [job for job in KINDS if job not in kinds]:
        raise SystemExit(f"{options.store} holds no finished cell of: {', '.join(lacking)}.")
    engine = engine_seconds(options.engine_encoders)
    shape = {name: getattr(options, name) for name in ("detectors", "defenses", "sharing")}
    record = {
        "format": "encoderguard.benchmark/1",
        "benchmark": "bench_cost",
        "command": f"python benchmarks/bench_cost.py --store {options.store}",
        "store": str(options.store),
        "kinds": kinds,
        "engine_seconds_per_cell": engine,
        "grid": shape,
        "grids": {
            str(n): extrapolated(kinds, grid(n, **shape), engine["computed"]) for n in options.encoders
        },
        **source_facts(),
    }
    print(markdown(record))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
