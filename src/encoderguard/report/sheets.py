"""Contact sheets: rows of small pictures with their captions, as PNG bytes. Same input, same bytes."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from encoderguard.report.figures import COLOURS
from encoderguard.report.pixels import Pixels

__all__ = ["sheet"]

_SIDE = 128  # the least side that a picture is shown with
_GAP, _EDGE, _LABELS = 6, 16, 104
_TITLE, _TEXT = 17, 13  # font sizes


def sheet(rows: Mapping[str, Sequence[Pixels]], *, title: str, note: str = "") -> bytes:
    """A PNG with one row of pictures per caption.

    Args:
        rows: caption to pictures, uint8 ``[H, W, 3]``, all of one size; small ones are enlarged by whole
            pixels.
        title: above the rows; long ones are wrapped.
        note: below the title, smaller.
    """
    pictures = {label: [_enlarged(picture) for picture in row] for label, row in rows.items()}
    height, width = next(iter(pictures.values()))[0].shape[:2]
    columns = max(len(row) for row in pictures.values())
    left, inner = _EDGE + _LABELS, columns * (width + _GAP) - _GAP
    room = _LABELS + inner
    heading = [(line, _TITLE) for line in _wrapped(title, room, _TITLE)]
    heading += [(line, _TEXT) for line in _wrapped(note, room, _TEXT)]
    top = _EDGE + sum(size + 7 for _, size in heading) + 6
    bottom = top + len(pictures) * (height + _GAP) - _GAP
    canvas = Image.new("RGB", (left + inner + _EDGE, bottom + _EDGE), "white")
    drawing, y = ImageDraw.Draw(canvas), _EDGE
    for line, size in heading:
        drawing.text(
            (_EDGE, y), line, fill="#2B333B" if size == _TITLE else COLOURS["neutral"], font=_font(size)
        )
        y += size + 7
    for index, (label, row) in enumerate(pictures.items()):
        y = top + index * (height + _GAP)
        middle = (_EDGE, y + height / 2)
        drawing.multiline_text(
            middle, "\n".join(textwrap.wrap(label, 13)), fill="#2B333B", font=_font(_TEXT), anchor="lm"
        )
        for column, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture), (left + column * (width + _GAP), y))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _enlarged(picture: Pixels) -> Pixels:
    factor = max(1, -(-_SIDE // picture.shape[1]))
    return np.ascontiguousarray(picture.repeat(factor, axis=0).repeat(factor, axis=1))


def _wrapped(text: str, room: int, size: int) -> list[str]:
    return textwrap.wrap(text, max(20, int(room / (0.58 * size))))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along, so that a sheet looks alike on every machine."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )
