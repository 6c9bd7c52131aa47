"""The benchmark from the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encoderguard.cli.options import DetectorName, References, Settings, parse_settings
from encoderguard.cli.running import guarded, put, say, watched

if TYPE_CHECKING:
    from encoderguard.bench.cells import Places
    from encoderguard.bench.plan import Plan

__all__ = ["bench", "scan_fleet"]

bench = typer.Typer(help="Settle claims: tables and figures of the papers, by one command each.")

Packs = Annotated[
    Path | None,
    typer.Option(envvar="ENCODERGUARD_DATA", help="Folder with image sets as subfolders, by name."),
]
Accelerators = Annotated[
    float | None,
    typer.Option(min=0, help="Share of one for each, such as 0.25 (Ray).", show_default="1 if there are any"),
]


@bench.command("run")
def run(
    suites: Annotated[list[str], typer.Argument(help="Suites by name or TOML file, or: all.")],
    size: Annotated[str, typer.Option(help="tiny, digits, small, paper, or a TOML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/bench"),
    store: Annotated[
        Path | None, typer.Option(help="Folder of finished cells.", show_default="OUT/store")
    ] = None,
    packs: Packs = None,
    zoo: Annotated[
        Path | None, typer.Option(help="Take the encoders of this zoo, instead of training and attacking.")
    ] = None,
    victim: Annotated[
        list[str] | None,
        typer.Option(help="Of the zoo take this attacked encoder; may be repeated.", show_default="all"),
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where torchvision keeps its data sets.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download what is missing.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Worker processes here, or Ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at the same time.", show_default="all cores")
    ] = None,
    accelerators: Accelerators = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed.")] = False,
) -> int:
    """Run suites; what is in the store is not computed again."""

    def work() -> int:
        from encoderguard.bench.run import plans, run_bench

        places = _places(packs, data_root, download=download, device=device)
        if dry_run:
            planned = plans(suites, size, places, zoo=zoo, victims=victim or ())
            return _show_plans(planned, store or out / "store")
        with watched() as (progress, stop):
            pages, outcome = run_bench(
                suites,
                size=size,
                out=out,
                store=store,
                places=places,
                zoo=zoo,
                victims=victim or (),
                engine=engine,
                workers=workers,
                accelerators=accelerators,
                progress=progress,
                stop=stop,
            )
        if outcome.lost:
            say(f"Warning: {len(outcome.lost)} workers died; their cells were computed again.")
        print(f"{len(outcome.computed)} cells computed, {len(outcome.kept)} were there.")
        for page in pages:
            print(page)
        return 0

    return guarded(work)


def _places(packs: Path | None, data_root: Path | None, *, download: bool, device: str) -> "Places":
    from encoderguard.bench.cells import Places

    return Places(
        packs=None if packs is None else str(packs),
        data_root=None if data_root is None else str(data_root),
        download=download,
        device=device,
    )


def _show_plans(planned: "Sequence[Plan]", store: Path) -> int:
    from encoderguard.bench.store import count_finished

    for plan in planned:
        cells = plan.cells()
        there = count_finished(store, cells)
        print(f"{plan.suite.name}: {len(cells)} cells, {there} in the store, {len(plan.rows)} rows")
        for line in plan.missing:
            print(f"  {line}")
    return 0


@bench.command("list")
def list_suites(
    as_json: Annotated[bool, typer.Option("--json", help="All details as JSON.")] = False,
) -> int:
    """Show the suites that come with the package."""

    def show() -> int:
        from encoderguard.bench.suite import load_suite, suite_names

        known = [load_suite(name) for name in suite_names()]
        if as_json:
            print(json.dumps([suite.model_dump(mode="json") for suite in known], indent=2))
        else:
            for suite in known:
                print(f"{suite.name:28} {suite.item:12} {suite.title}")
        return 0

    return guarded(show)


@bench.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A result, or a folder of results.", show_default=False)],
) -> int:
    """Compute every table again from its records; fails on a number that no record gives."""

    def work() -> int:
        from encoderguard.bench.page import verify_all

        count, faults = verify_all(folder)
        put("\n".join([*faults, f"{count} results, {len(faults)} faults."]))
        return 2 if faults else 0

    return guarded(work)


def scan_fleet(
    specs: Annotated[Path, typer.Argument(help="Text file: one encoder spec per line.", show_default=False)],
    images: Annotated[str, typer.Option(help="Clean unlabelled images, the same for all.")] = "digits:train",
    detector: DetectorName = None,
    references: References = None,
    count: Annotated[int, typer.Option(min=1, help="Images to draw with the seed.")] = 1000,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Bring images to this side in pixels.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/fleet"),
    packs: Packs = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Worker processes here, or Ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Scans at the same time.", show_default="all cores")
    ] = None,
    accelerators: Accelerators = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    setting: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the results.")] = False,
) -> int:
    """Scan many encoders; finished scans are not repeated."""

    def work() -> int:
        from encoderguard.bench import fleet
        from encoderguard.bench.cells import Places
        from encoderguard.jobs import detector_for, with_references

        listed = fleet.read_specs(specs)
        settings = with_references(parse_settings(setting), references or [])
        with watched() as (progress, stop):
            found = fleet.scan_fleet(
                listed,
                images,
                detector=detector or detector_for(settings),
                settings=settings,
                count=count,
                seed=seed,
                image_size=image_size,
                out=out,
                places=Places(packs=None if packs is None else str(packs), device=device),
                engine=engine,
                workers=workers,
                accelerators=accelerators,
                progress=progress,
                stop=stop,
            )
        text = json.dumps(found, indent=1) if as_json else (out / "fleet.md").read_text(encoding="utf-8")
        put(text, end="")
        return fleet.exit_code(found)

    return guarded(work)
