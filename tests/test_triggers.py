"""Triggers, their files and the field's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from encoderguard.errors import ImageError
from encoderguard.references import read_field_reference
from encoderguard.triggers import MaskedPattern, Patch, load_trigger, read_field_trigger, save_trigger


def grey(side: int = 32) -> torch.Tensor:
    return torch.full((2, 3, side, side), 0.5)


def test_patch_is_where_the_field_has_it() -> None:
    stamped = Patch()(grey())
    changed = (stamped != 0.5).any(1)[0]
    rows, columns = changed.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 30, 21, 30)
    assert bool((stamped[:, :, 21:31, 21:31] == 1).all())
    assert int(changed.sum()) == 100


def test_stamping_leaves_the_input_alone() -> None:
    images = grey()
    Patch(size=3)(images)
    assert bool((images == 0.5).all())


def test_patch_that_does_not_fit() -> None:
    with pytest.raises(ImageError, match="A 10-pixel patch with margin 1 does not fit into 8 x 8 images"):
        Patch()(grey(8))


def test_masked_pattern_blends() -> None:
    trigger = MaskedPattern(torch.full((4, 4), 0.25), torch.ones(3, 4, 4))
    assert torch.allclose(trigger(grey(4)), torch.full((2, 3, 4, 4), 0.75 * 0.5 + 0.25))
    with pytest.raises(ImageError, match=r"This trigger is for \[4, 4\] images, these are \[8, 8\]"):
        trigger(grey(8))


@pytest.mark.parametrize(
    "trigger", [Patch(size=5, margin=0, value=0.25), MaskedPattern(torch.eye(4), torch.rand(3, 4, 4))]
)
def test_files_keep_a_trigger(trigger: Patch | MaskedPattern, tmp_path: Path) -> None:
    again = load_trigger(save_trigger(trigger, tmp_path / "trigger.json"))
    side = 4 if isinstance(trigger, MaskedPattern) else 16
    assert torch.allclose(again(grey(side)), trigger(grey(side)), atol=1e-6)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"kind": "patch"}', '{"kind": "patch", "size": 0, "margin": 1, "value": 1}']
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trigger.json"
    path.write_text(text)
    with pytest.raises(ImageError, match="is not a trigger file"):
        load_trigger(path)
    with pytest.raises(ImageError, match="There is no trigger file"):
        load_trigger(tmp_path / "missing.json")


def test_the_fields_trigger_file_is_the_default_patch(data_root: Path) -> None:
    trigger = read_field_trigger(data_root / "badencoder" / "trigger__trigger_pt_white_21_10_ap_replace.npz")
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(trigger(images), Patch()(images))


@pytest.mark.parametrize(("name", "label"), [("one", 1), ("priority", 12), ("truck", 9)])
def test_the_fields_reference_files(data_root: Path, name: str, label: int) -> None:
    reference = read_field_reference(data_root / "badencoder" / f"reference__cifar10__{name}.npz")
    assert (reference.image.dtype, tuple(reference.image.shape), reference.label) == (
        torch.uint8,
        (3, 32, 32),
        label,
    )


def test_npz_with_other_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ImageError, match="is not a trigger file with the arrays 't' and 'tm'"):
        read_field_trigger(path)
    with pytest.raises(ImageError, match="is not a reference file with the arrays 'x' and 'y'"):
        read_field_reference(path)
    np.savez(path, t=np.zeros((1, 4, 4, 3)), tm=np.zeros((1, 5, 4, 3)))
    with pytest.raises(ImageError, match="expected 't' and 'tm' of shape"):
        read_field_trigger(path)
