"""What a page is made of; the template knows how to show each of these and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from encoderguard.report.pixels import Pixels, data_uri, png

__all__ = ["Block", "Gallery", "Note", "Picture", "Points", "Section", "Table", "chart", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image inside the page: a ``data:`` address, words for those who cannot see it, and a title."""

    source: str
    alt: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures that wrap: as many columns as the screen has room for."""

    pictures: Sequence[Picture]
    shape: Literal["wide", "charts", "panels", "curves", "tiles", "thumbs"] = "wide"
    caption: str = ""
    kind: Literal["gallery"] = "gallery"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first cell of each row names it."""

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = field(default_factory=list)
    caption: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A paragraph."""

    text: str
    kind: Literal["note"] = "note"


@dataclass(frozen=True, kw_only=True)
class Points:
    """A titled list of sentences."""

    title: str
    items: Sequence[str]
    kind: Literal["points"] = "points"


Block = Gallery | Table | Note | Points


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def chart(svg: bytes, alt: str, title: str = "") -> Picture:
    """An SVG chart as a picture."""
    return Picture(source=data_uri(svg, "image/svg+xml"), alt=alt, title=title)


def pixels(image: Pixels, alt: str, title: str = "") -> Picture:
    """A pixel array ``[H, W, 3]`` as a picture with sharp pixels."""
    return Picture(source=data_uri(png(image), "image/png"), alt=alt, title=title)
