"""Runs suites: plan, compute what is missing, write tables and figures."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from encoderguard.bench.cells import Places, open_images
from encoderguard.bench.engine import Backend, Outcome, run_cells
from encoderguard.bench.leaderboard import write_leaderboard
from encoderguard.bench.local import Local
from encoderguard.bench.outcome import collect, write_result
from encoderguard.bench.page import write_pages
from encoderguard.bench.plan import Plan
from encoderguard.bench.planner import make_plan
from encoderguard.bench.store import Store
from encoderguard.bench.suite import SizeName, load_suite, size_named, suite_names
from encoderguard.errors import RunError, SettingError
from encoderguard.run import Progress, StopSignal

__all__ = ["EngineName", "backend", "plans", "run_bench"]

EngineName = Literal["local", "ray"]


def backend(
    engine: EngineName,
    store: Store,
    places: Places,
    *,
    workers: int | None = None,
    accelerators: float | None = None,
) -> Callable[[], Backend]:
    """Makes the backend of that name, when there is something to compute.

    Raises:
        SettingError: shares of accelerators are asked of the local engine.
    """
    if engine == "local" and accelerators is not None:
        raise SettingError("Shares of accelerators need Ray; leave --accelerators out, or add --engine ray.")

    def make() -> Backend:
        if engine == "ray":
            from encoderguard.bench.on_ray import OnRay

            return OnRay(store, places, workers=workers, accelerators=accelerators)
        return Local(store, places, workers=workers or os.cpu_count() or 1)

    return make


def plans(
    suites: Sequence[str],
    size: str,
    places: Places,
    *,
    zoo: Path | None = None,
    victims: Sequence[str] = (),
) -> list[Plan]:
    """The plans of the named suites; ``all`` is every suite that comes with the package.

    With ``zoo`` the encoders of that folder are taken, of them those named in ``victims`` if there are any,
    and nothing is trained or attacked.

    Raises:
        SettingError: an unknown suite, size, method, setting, task or victim; victims without a zoo.
        ImageError: the pre-training images cannot be had.
    """
    names = suite_names() if list(suites) == ["all"] else list(suites)
    digests: dict[str, str] = {}

    def digest(spec: str) -> str:
        if spec not in digests:
            digests[spec] = open_images(spec, places).digest
        return digests[spec]

    chosen, base = size_named(size), Path(size).stem
    if victims and zoo is None:
        raise SettingError("Encoders are named, but no zoo that holds them; give its folder with --zoo.")
    if zoo is not None:
        chosen = chosen.model_copy(update={"zoo": str(zoo), "victims": tuple(victims)})
    as_size: Any = base if base in SizeName.__args__ else "small"  # type: ignore[attr-defined]
    return [make_plan(load_suite(name).sized(as_size), chosen, base, digest=digest) for name in names]


def run_bench(
    suites: Sequence[str],
    *,
    size: str = "tiny",
    out: Path,
    store: Path | None = None,
    places: Places | None = None,
    zoo: Path | None = None,
    victims: Sequence[str] = (),
    engine: EngineName = "local",
    workers: int | None = None,
    accelerators: float | None = None,
    progress: Progress = lambda task, done, total, note="": None,
    stop: StopSignal | None = None,
) -> tuple[list[Path], Outcome]:
    """Compute suites and write ``OUT/SUITE-SIZE/`` for each.

    Args:
        suites: names, TOML files, or ``all``.
        size: ``tiny``, ``digits``, ``small``, ``paper``, or a TOML file with the fields of a size.
        out: folder of the results.
        store: folder of the finished cells, shared by all suites; ``OUT/store`` by default.
        places: where data are, which device.
        zoo: folder of a zoo whose encoders are taken instead of training and attacking anew.
        victims: names of the zoo's attacked encoders to take; all that fit by default.
        engine: worker processes here, or Ray.
        workers: cells at the same time; all cores, or what the Ray cluster has room for, by default.
        accelerators: share of one for each cell, with Ray; a whole one by default where there are any.
        progress: shown as cells finish.
        stop: set it to stop; cells resume from their checkpoints.

    Returns:
        The pages, the leaderboard over all results in ``out`` last, and what became of the cells.

    Raises:
        UsageError: an argument cannot be used as given.
        RunError: a cell failed; everything that did not need it is there.
        Stopped: the user asked to stop.
    """
    if not suites:
        raise SettingError(f"Name a suite, or all; known are {', '.join(suite_names())}.")
    where, kept = places or Places(), Store(store or out / "store")
    make = backend(engine, kept, where, workers=workers, accelerators=accelerators)
    planned = plans(suites, size, where, zoo=zoo, victims=victims)
    cells = list(dict.fromkeys(cell for plan in planned for cell in plan.cells()))

    outcome = run_cells(cells, kept, make, progress=progress, stop=stop or StopSignal())
    pages = []
    for plan in planned:
        folder = out / f"{plan.suite.name}-{plan.size}"
        write_result(collect(plan, kept, outcome), folder)
        pages.append(write_pages(folder))
    pages.append(write_leaderboard(out))
    if outcome.failed:
        first = next(iter(outcome.failed.values()))
        raise RunError(
            f"{len(outcome.failed)} of {len(cells)} cells failed; the first: {first} "
            f"The tables in {out} name them all."
        )
    return pages, outcome
