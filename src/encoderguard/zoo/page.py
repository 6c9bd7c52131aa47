"""A zoo as one HTML page: the table of its encoders, and what each attack's trigger looks like.

The triggers are shown on digits and on made colours, so that the page needs no data set and repeats none.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from encoderguard.errors import EncoderGuardError
from encoderguard.images import ImageSet, load_images
from encoderguard.jobs.sheets import trigger_views
from encoderguard.report.blocks import Block, Gallery, Note, Picture, Section, Table
from encoderguard.report.page import render_sections
from encoderguard.report.pixels import data_uri, pictures
from encoderguard.report.sheets import sheet
from encoderguard.storage import write_text
from encoderguard.triggers import Trigger, load_trigger
from encoderguard.zoo.manifest import Entry, Manifest

__all__ = ["PAGE", "contact_sheet", "table_rows", "write_page"]

PAGE = "index.html"
HEADER = (
    "encoder",
    "attack",
    "target",
    "seed",
    "ACC",
    "clean ACC",
    "ASR",
    "ASR, all",
    "clean ASR",
    "backdoor",
)
_SHOWN = 6  # pictures in a row of a contact sheet


def write_page(folder: Path, manifest: Manifest) -> Path:
    """Write ``index.html`` into the zoo's folder. Raises as ``write_atomic``."""
    built = [entry for entry in manifest.cells if entry.status == "built"]
    attacked = sum(entry.attack is not None for entry in built)
    sections = [Section(title="Encoders", blocks=list(_tables(manifest)))]
    sheets = list(_sheets(folder, built))
    if sheets:
        sections.append(Section(title="Triggers", blocks=sheets))
    page = render_sections(
        f"Zoo {manifest.name}",
        sections,
        facts=[("encoders", str(len(built))), ("of them backdoored", str(attacked))],
        summary=manifest.title,
        provenance=[("digest", manifest.digest), ("format", manifest.format)],
        content=manifest.model_dump(mode="json"),
    )
    return write_text(folder / PAGE, page)


def table_rows(entries: list[Entry]) -> list[list[str]]:
    """The cells under ``HEADER``; what is not known is a dash."""
    rows = []
    for entry in entries:
        shares = (entry.acc, entry.clean_acc, entry.asr, entry.asr_all, entry.clean_asr)
        numbers = ["-" if value is None else f"{value:.1%}" for value in shares]
        target = "-" if entry.target is None else str(entry.target_name or entry.target)
        last = entry.band or "-" if entry.status == "built" else "not built"
        rows.append([entry.name, entry.attack or "none", target, str(entry.seed), *numbers, last])
    return rows


def _tables(manifest: Manifest) -> Iterator[Block]:
    yield Table(
        header=HEADER,
        rows=table_rows(manifest.cells),
        caption="ACC and ASR downstream, of the stored float16 bundles. ASR counts test images of other "
        "classes than the target; clean ASR is that of the clean encoder under the same trigger. "
        "Backdoor: strong from 95 % ASR, medium from 50 %, weak from 10 %; failed below, or less than "
        "10 points above clean ASR.",
    )
    failed = [[entry.name, str(entry.error)] for entry in manifest.cells if entry.status == "failed"]
    if failed:
        yield Table(rows=failed, caption="Encoders that could not be built.")


def _sheets(folder: Path, entries: list[Entry]) -> Iterator[Block]:
    """One sheet per attack and trigger variant: the first of its encoders."""
    shown = set()
    for entry in entries:
        kind = (entry.attack, (entry.trigger or {}).get("variant"))
        if entry.trigger_file is None or kind in shown:
            continue
        shown.add(kind)
        try:
            content = contact_sheet(load_trigger(folder / entry.trigger_file), int(entry.images["size"]))
        except EncoderGuardError as error:
            yield Note(text=f"{entry.name}: {error}")
            continue
        alt = f"{entry.name}: pictures, the same with the trigger, and the difference"
        picture = Picture(source=data_uri(content, "image/png"), alt=alt, title=entry.name)
        yield Gallery(pictures=[picture], shape="wide")


def contact_sheet(trigger: Trigger, size: int) -> bytes:
    """A PNG of pictures, the same stamped, and the amplified difference."""
    views = trigger_views(_pictures(size), trigger, _SHOWN)
    captions = {"images": "clean", "stamped": "triggered", "difference": "difference times 10"}
    rows = {caption: pictures(views, name, _SHOWN) for name, caption in captions.items()}
    return sheet(rows, title=trigger.title)


def _pictures(size: int) -> ImageSet:
    """Digits, and smooth colours."""
    half = _SHOWN // 2
    digits = load_images("digits:test", size=size).take(range(half))
    down, right = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    made = [
        torch.stack([down, right, 0.5 + 0.5 * torch.sin((k + 1) * (down + right) + k)]).roll(k, 0)
        for k in range(_SHOWN - half)
    ]
    colours = (torch.stack(made) * 204 + 25).to(torch.uint8)
    return ImageSet.from_arrays(torch.cat([digits, colours]))
