"""The zoo from the command line: encoders to test detectors and defenses on, built from a recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encoderguard.cli.running import guarded, put, say, watched

if TYPE_CHECKING:
    from encoderguard.zoo import Entry, Manifest, Pictures

__all__ = ["zoo"]

zoo = typer.Typer(
    help="Clean and backdoored encoders that anyone can build again: build, list, verify, show."
)

FAILED, FINDING = 2, 1
_FIELDS = ("name", "attack", "pretrain", "seed", "acc", "asr", "asr_all", "clean_asr")
_MORE = ("clean_acc", "target", "band", "status", "error")

Root = Annotated[Path, typer.Option("--zoo", help="Folder of the zoos.")]
Names = Annotated[
    list[str] | None, typer.Argument(help="Zoos by name or folder; by default all.", show_default=False)
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=PATH", help="Where the image set NAME lies; may be repeated."),
]
Packs = Annotated[
    Path | None,
    typer.Option(envvar="ENCODERGUARD_DATA", help="Folder with image sets as subfolders, by name."),
]
DataRoot = Annotated[Path | None, typer.Option(help="Where torchvision keeps its data sets.")]
Download = Annotated[bool, typer.Option("--download", help="Download a named data set if it is missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


@zoo.command("build")
def build(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of one in ZOO/recipes.")],
    root: Root = Path("zoo"),
    folder: Annotated[
        Path | None, typer.Option("--build", help="Folder of the jobs.", show_default="runs/zoo-NAME")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Encoders at the same time, one thread each.")] = 1,
    data: Data = None,
    packs: Packs = None,
    data_root: DataRoot = None,
    download: Download = False,
    adopt: Annotated[
        Path | None, typer.Option(help="Take over finished jobs below this folder where they fit.")
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show cells, costs and missing data.")] = False,
) -> int:
    """Build what is missing of a zoo; a second call does nothing. Exit code 2: an encoder failed."""

    def work() -> int:
        from encoderguard.zoo import Site, build_zoo, read_recipe
        from encoderguard.zoo.page import write_page

        chosen = read_recipe(_recipe_path(recipe, root))
        place = folder or Path("runs") / f"zoo-{chosen.name}"
        pictures = _pictures(data, packs, data_root, download, None if dry_run else place / ".images")
        if dry_run:
            from encoderguard.zoo.estimate import plan_lines

            for line in plan_lines(chosen, pictures, place):
                print(line)
            return 0
        site = Site(
            recipe=chosen.name,
            zoo=root / chosen.name,
            build=place,
            pictures=pictures,
            device=device,
            adopt=adopt,
        )
        try:
            with watched() as (progress, stop):
                manifest = build_zoo(chosen, site, jobs=jobs, progress=progress, stop=stop, tell=say)
        except KeyboardInterrupt:
            say("To continue, give the same command again; finished encoders are kept.")
            raise
        failed = [entry.name for entry in manifest.cells if entry.status == "failed"]
        print(f"Zoo {manifest.name}: {len(manifest.cells) - len(failed)} encoders in {site.zoo}.")
        print(f"Digest: {manifest.digest}")
        print(f"Page: {write_page(site.zoo, manifest)}")
        if failed:
            say(f"{len(failed)} of {len(manifest.cells)} failed: {', '.join(failed)}; see the manifest.")
        return FAILED if failed else 0

    return guarded(work)


@zoo.command("list")
def list_zoos(names: Names = None, root: Root = Path("zoo"), as_json: AsJson = False) -> int:
    """List the encoders of all zoos, with accuracy and attack success."""

    def work() -> int:
        found = _entries(root, names)
        if as_json:
            print(json.dumps([_listed(folder, entry) for folder, entry in found], indent=2))
            return 0
        from encoderguard.zoo.page import HEADER, table_rows

        for folder in dict.fromkeys(folder for folder, _ in found):
            print(folder)
            rows = [list(HEADER), *table_rows([entry for where, entry in found if where == folder])]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                print(
                    "  "
                    + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                )
        return 0

    return guarded(work)


@zoo.command("show")
def show(
    name: Annotated[str, typer.Argument(help="An encoder, as CELL or ZOO/CELL.", show_default=False)],
    root: Root = Path("zoo"),
) -> int:
    """Show all that the manifest says of one encoder, as JSON."""

    def work() -> int:
        from encoderguard.errors import SettingError

        found = [
            (folder, entry)
            for folder, entry in _entries(root, None)
            if name in (entry.name, f"{folder.name}/{entry.name}")
        ]
        if len(found) != 1:
            places = ", ".join(f"{folder.name}/{entry.name}" for folder, entry in found)
            told = f"is in several zoos ({places}); name one" if found else "is in no zoo; see 'zoo list'"
            raise SettingError(f"The encoder '{name}' {told}.")
        folder, entry = found[0]
        print(json.dumps(_listed(folder, entry) | entry.model_dump(mode="json"), indent=2))
        return 0

    return guarded(work)


@zoo.command("page")
def page(names: Names = None, root: Root = Path("zoo")) -> int:
    """Draw the pages of zoos again, from their manifests."""

    def work() -> int:
        from encoderguard.zoo.page import write_page

        for folder, manifest in _zoos(root, names):
            print(write_page(folder, manifest))
        return 0

    return guarded(work)


@zoo.command("verify")
def verify(
    names: Names = None,
    root: Root = Path("zoo"),
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure again and compare.")] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference of a fraction that passes.")
    ] = 0.01,
    data: Data = None,
    packs: Packs = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Compare zoos with their manifests: digests, bundles, triggers. Exit code 1: something differs."""

    def work() -> int:
        from encoderguard.zoo.checks import remeasure, verify_zoo

        lines, checked = [], 0
        for folder, manifest in _zoos(root, names):
            problems, checked = verify_zoo(folder, manifest), checked + len(manifest.cells)
            if evaluate and not problems:
                pictures = _pictures(data, packs, data_root, download, None)
                problems = remeasure(folder, manifest, pictures, tolerance=tolerance, device=device, tell=say)
            lines += [{"zoo": folder.name, "name": found.cell, "problem": found.text} for found in problems]
        if as_json:
            put(json.dumps(lines, indent=2))
        else:
            told = [
                f"{'/'.join(filter(None, [line['zoo'], line['name']]))}: {line['problem']}" for line in lines
            ]
            put("\n".join([*told, f"{checked} encoders checked, {len(lines)} problems."]))
        return FINDING if lines else 0

    return guarded(work)


def _recipe_path(given: str, root: Path) -> Path:
    named = root / "recipes" / f"{given}.toml"
    return named if "/" not in given and not given.endswith(".toml") else Path(given)


def _pictures(
    data: list[str] | None, packs: Path | None, root: Path | None, download: bool, notes: Path | None
) -> "Pictures":
    from encoderguard.zoo.pictures import Pictures, parse_places

    return Pictures(parse_places(data or []), packs=packs, data_root=root, download=download, notes=notes)


def _zoos(root: Path, names: list[str] | None) -> list[tuple[Path, "Manifest"]]:
    """Those below the root that are named, or lie in a folder that is given; all, if none is."""
    from encoderguard.errors import SettingError
    from encoderguard.zoo import find_manifests, read_manifest

    given = names or []
    folders = [Path(name) for name in given if "/" in name]
    wanted = [name for name in given if "/" not in name]
    chosen = [(folder, read_manifest(folder)) for folder in folders]
    if folders and not wanted:
        return chosen
    found = find_manifests(root)
    if not found:
        raise SettingError(f"There is no zoo in {root}; build one with 'encoderguard zoo build tiny'.")
    known = {folder.name for folder, _ in found}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SettingError(
            f"There is no zoo '{unknown[0]}' in {root}; there are: {', '.join(sorted(known))}."
        )
    return chosen + [pair for pair in found if not wanted or pair[0].name in wanted]


def _entries(root: Path, names: list[str] | None) -> list[tuple[Path, "Entry"]]:
    return [(folder, entry) for folder, manifest in _zoos(root, names) for entry in manifest.cells]


def _listed(folder: Path, entry: "Entry") -> dict[str, object]:
    listed = {name: getattr(entry, name) for name in (*_FIELDS, *_MORE)}
    for name, file in (("path", entry.bundle), ("trigger_path", entry.trigger_file)):
        listed[name] = None if file is None else str(folder / file)
    return {"zoo": folder.name, **listed}
