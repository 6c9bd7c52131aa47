"""The commands put together, and the entry point."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from encoderguard.cli import commands
from encoderguard.cli.bench import bench, scan_fleet
from encoderguard.cli.filtering import filter_images
from encoderguard.cli.running import STOPPED, USAGE, guarded, say
from encoderguard.cli.story import demo
from encoderguard.cli.zoo import zoo

__all__ = ["app", "main"]

app = typer.Typer(
    name="encoderguard",
    help="Find backdoors in pre-trained image encoders, and remove them, with unlabelled images only.",
    epilog="Exit codes: 0 no finding, 1 finding, 2 run failed, 3 inconclusive, 4 usage error, 130 stopped.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for job in (
    commands.pretrain,
    commands.attack,
    commands.poison,
    commands.scan,
    commands.purify,
    commands.evaluate,
    demo,
):
    app.command()(job)
app.command("filter")(filter_images)
app.add_typer(bench, name="bench")
app.command("scan-fleet")(scan_fleet)
app.add_typer(zoo, name="zoo")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or its result.json.", show_default=False)],
) -> int:
    """Draw the report of a run again, from its record."""

    def draw() -> int:
        from encoderguard.report import write_report

        print(write_report(folder.parent if folder.is_file() else folder))
        return 0

    return guarded(draw)


@app.command("list")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="All details as JSON.")] = False,
) -> int:
    """Show the known methods and their settings."""

    def show() -> int:
        from encoderguard.cli.catalogue import catalogue, in_words

        known = catalogue()
        print(json.dumps(known, indent=2, default=str) if as_json else in_words(known))
        return 0

    return guarded(show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Errors are one sentence on standard error."""
    try:
        code = app(
            None if arguments is None else list(arguments), prog_name="encoderguard", standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        say("Stopped.")
        return STOPPED
    except Exception as error:
        # Which class a wrong argument raises differs between versions of typer; what it can do does not.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        context = getattr(error, "ctx", None)
        path = "encoderguard" if context is None else context.command_path
        sentence = " ".join(str(describe()).split()).rstrip(".")
        say(f"Error: {sentence}; see '{path} --help'.")
        return USAGE
    return int(code or 0)
