"""Contact sheets: what is in the arrays, and that the picture holds them."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoderguard.errors import ImageError
from encoderguard.images import ImageSet
from encoderguard.jobs.sheets import contact_sheet, trigger_facts, trigger_views
from encoderguard.report.sheets import sheet
from encoderguard.triggers import Additive, Patch, Trigger


def greys(n: int = 3) -> ImageSet:
    levels = torch.full((n, 3, 8, 8), 100, dtype=torch.uint8)
    return ImageSet.from_arrays(levels, name="greys")


def faint(levels: float) -> Additive:
    pattern = torch.zeros(3, 8, 8)
    pattern[0, 0, 0] = levels / 255
    return Additive(pattern)


@pytest.mark.parametrize(
    ("trigger", "factor", "expected"),
    [
        (faint(7), 10, 198),  # 128 + 10 x 7
        (faint(-20), 10, 0),  # cut
        (faint(40), 2, 208),
        (faint(155), 0.5, 206),  # 128 + 77.5, to even
    ],
)
def test_the_difference_is_drawn_around_grey(trigger: Trigger, factor: float, expected: int) -> None:
    views = trigger_views(greys(), trigger, count=2)
    assert views["images"].shape == views["stamped"].shape == views["difference"].shape == (2, 8, 8, 3)
    assert views["factor"].tolist() == [factor]
    assert views["difference"][:, 0, 0, 0].tolist() == [expected] * 2
    assert set(views["difference"][:, 1:].ravel().tolist()) == {128}


def test_facts_by_hand() -> None:
    facts = trigger_facts(greys(), Patch(size=2, margin=0))
    assert facts["peak"] == 155
    assert facts["changed"] == 4 / 64
    assert facts["psnr"] == pytest.approx(10 * math.log10(255**2 / (155**2 / 16)))
    assert trigger_facts(greys(), faint(0)) == {"peak": 0, "psnr": math.inf, "changed": 0}


def test_a_sheet_holds_every_picture_in_whole_pixels(tmp_path: Path) -> None:
    path = contact_sheet(greys(4), Patch(size=2, margin=0), tmp_path / "new" / "sheet.png", count=4)
    again = contact_sheet(greys(4), Patch(size=2, margin=0), tmp_path / "again.png", count=4)
    assert path.read_bytes() == again.read_bytes()
    shown = np.asarray(Image.open(path))
    # four pictures of 8 px, enlarged 16 times; the white squares of 2 px are left out below
    grey_pixels = int((shown == 100).all(-1).sum())
    assert grey_pixels == 4 * 128**2 + 4 * (128**2 - 32**2)
    assert shown.shape[1] == 16 + 104 + 4 * 128 + 3 * 6 + 16
    with pytest.raises(ImageError, match="does not fit into 8 x 8 images"):
        contact_sheet(greys(), Patch(size=9), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_large_pictures_keep_their_size_and_long_titles_are_wrapped() -> None:
    picture = np.full((200, 150, 3), 7, np.uint8)
    short, long = (
        Image.open(io.BytesIO(sheet({"a": [picture], "b": [picture]}, title=title)))
        for title in ("t", "a long title " * 9)
    )
    assert int((np.asarray(short) == 7).all(-1).sum()) == 2 * 200 * 150
    assert long.width == short.width
    assert long.height > short.height
