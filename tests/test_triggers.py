"""Triggers, their files and the field's own."""

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.references import read_field_reference
from encoderguard.triggers import (
    Additive,
    Blend,
    ColourMap,
    ColourPatch,
    FourCorner,
    FreshNoise,
    MaskedPattern,
    Patch,
    PixelGrid,
    SpectralDCT,
    Trigger,
    Warp,
    load_trigger,
    read_field_trigger,
    save_trigger,
    stamp_uint8,
    trigger_from_dict,
    trigger_named,
    trigger_names,
)
from encoderguard.triggers.base import _KINDS


def grey(side: int = 32, n: int = 2) -> Tensor:
    return torch.full((n, 3, side, side), 0.5)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=Rng(seed).generator())


SIDE = 12
WAVE = SpectralDCT(magnitude=50, coefficients=((3, 3), (7, 7)), window=8)
# at least one of every kind, for 12 x 12 images
TRIGGERS: list[Trigger] = [
    Patch(size=5, margin=0, value=0.25),
    MaskedPattern(uniform(SIDE, SIDE), uniform(3, SIDE, SIDE)),
    ColourPatch(size=5, seed=3, span=(0.1, 0.9), opacity=0.7),
    ColourPatch(size=4, place=(2, 7), smooth=False),
    ColourPatch.solid((1, 0.5, 0), size=3),
    Blend(uniform(3, SIDE, SIDE), 0.3),
    Blend.noise(1, (SIDE, SIDE)),
    FreshNoise(alpha=0.4, seed=2),
    FreshNoise(grey=True),
    Additive(uniform(3, SIDE, SIDE) * 2 - 1),
    Additive.noise(1, (SIDE, SIDE)),
    WAVE,
    PixelGrid(),
    FourCorner(),
    ColourMap(matrix=((0.5, 0.3, 0.2), (0, 1, 0), (0, 0.5, 0.5)), offset=(0.1, 0, -0.1)),
    Warp(strength=0.2),
]
every_kind = pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: t.title)


# What all kinds promise.


def test_the_list_above_has_every_kind() -> None:
    assert {trigger.kind for trigger in TRIGGERS} == set(_KINDS)


@given(
    trigger=st.sampled_from(TRIGGERS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    n=st.integers(0, 4),
    extreme=st.booleans(),
    seed=st.none() | st.integers(0, 5),
)
def test_shape_range_dtype_and_the_input_are_kept(
    trigger: Trigger, dtype: torch.dtype, n: int, extreme: bool, seed: int | None
) -> None:
    images = uniform(n, 3, SIDE, SIDE)
    images = (images.round() if extreme else images).to(dtype)
    before = images.clone()
    generators = [None if seed is None else Rng(seed).generator() for _ in range(2)]
    stamped, again = (trigger(images, generator) for generator in generators)
    assert (stamped.shape, stamped.dtype, stamped.device) == (images.shape, dtype, images.device)
    assert bool(((stamped >= 0) & (stamped <= 1)).all())
    assert torch.equal(images, before)
    assert torch.equal(stamped, again)
    assert n == 0 or stamped.data_ptr() != images.data_ptr()


@every_kind
def test_files_keep_every_kind_exactly(trigger: Trigger, tmp_path: Path) -> None:
    again = load_trigger(save_trigger(trigger, tmp_path / "trigger.json"))
    assert again == trigger
    assert hash(again) == hash(trigger)
    assert type(again) is type(trigger)
    images = uniform(3, 3, SIDE, SIDE)
    assert torch.equal(again(images), trigger(images))
    assert torch.equal(again.at_test()(images), trigger.at_test()(images))


@every_kind
def test_mask_area_and_static_are_what_the_pixels_say(trigger: Trigger) -> None:
    pictures = uniform(2, 3, SIDE, SIDE).repeat(6, 1, 1, 1)
    stamped = trigger(pictures)
    changed = (stamped != pictures).any(1)
    ever = (changed[::2] | changed[1::2]).float()
    if trigger.static:
        assert float(ever[0].mean()) == pytest.approx(trigger.mask_area((SIDE, SIDE)), abs=0.01)
        assert torch.equal(stamped[2:], stamped[:2].repeat(5, 1, 1, 1))
    else:
        assert float(changed.float().mean()) <= trigger.mask_area((SIDE, SIDE)) + 1e-6
        assert not torch.equal(stamped[2:4], stamped[:2])
    assert not (trigger.static and trigger.sample_specific)


@every_kind
def test_batches_with_one_generator_are_one_large_batch(trigger: Trigger) -> None:
    images, drawing = uniform(50, 3, SIDE, SIDE), Rng(7).generator()
    parts = torch.cat([trigger(part, drawing) for part in torch.split(images, [1, 19, 30])])
    assert torch.equal(parts, trigger(images, Rng(7).generator()))


@every_kind
def test_uint8_images_are_stamped_to_the_nearest_level(trigger: Trigger) -> None:
    images = (uniform(4, 3, SIDE, SIDE) * 255).round().to(torch.uint8)
    stamped = stamp_uint8(trigger, images, Rng(0).generator())
    exact = trigger(images.double() / 255, Rng(0).generator()) * 255
    assert stamped.dtype == torch.uint8
    assert float((stamped.double() - exact).abs().max()) <= 0.5 + 1e-4
    with pytest.raises(ImageError, match=r"stamp_uint8 expects uint8 images, found torch.float32"):
        stamp_uint8(trigger, images.float())


def test_all_256_levels_survive_where_nothing_is_stamped() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    stamped = stamp_uint8(Patch(size=1, margin=0), images)
    assert int((stamped != images).sum()) == 0  # the last level is white already
    stamped = stamp_uint8(Patch(size=1, margin=0, value=0), images)
    assert int((stamped != images).sum()) == 3


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), grey(8)[:, :1]]
)
def test_other_tensors_are_refused(bad: Tensor) -> None:
    with pytest.raises(ImageError, match=r"A trigger stamps float images \[N, 3, H, W\] in \[0, 1\], found"):
        Patch(size=2)(bad)


# Squares and masks.


def test_patch_is_where_the_field_has_it() -> None:
    stamped = Patch()(grey())
    changed = (stamped != 0.5).any(1)[0]
    rows, columns = changed.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 30, 21, 30)
    assert bool((stamped[:, :, 21:31, 21:31] == 1).all())
    assert int(changed.sum()) == 100


@pytest.mark.parametrize(
    ("image_size", "size", "first", "last"),
    [
        (32, None, 21, 30),
        (32, 10, 21, 30),
        (32, 5, 26, 30),
        (32, 3, 28, 30),
        (64, None, 42, 61),
        (224, None, 173, 222),
        (224, 50, 173, 222),
        (224, 24, 185, 208),
        (96, None, 65, 94),
        (8, None, 5, 6),
    ],
)
def test_the_fields_squares(image_size: int, size: int | None, first: int, last: int) -> None:
    changed = (Patch.field(image_size, size)(grey(image_size, 1)) == 1)[0, 0]
    expected = torch.zeros_like(changed)
    expected[first : last + 1, first : last + 1] = True
    assert torch.equal(changed, expected)


def test_patch_that_does_not_fit() -> None:
    with pytest.raises(ImageError, match="A 10-pixel patch with margin 1 does not fit into 8 x 8 images"):
        Patch()(grey(8))


def test_masked_pattern_blends() -> None:
    trigger = MaskedPattern(torch.full((4, 4), 0.25), torch.ones(3, 4, 4))
    assert torch.allclose(trigger(grey(4)), torch.full((2, 3, 4, 4), 0.75 * 0.5 + 0.25))
    with pytest.raises(ImageError, match=r"This trigger is for \[4, 4\] images, these are \[8, 8\]"):
        trigger(grey(8))


def test_colour_patch_at_a_fixed_place() -> None:
    grid = torch.tensor([[[1.0, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [0, 1]]])  # red, blue / green, white
    trigger = ColourPatch(size=4, colours=grid, smooth=False, place=(1, 3), opacity=0.5)
    stamped = trigger(torch.zeros(1, 3, 8, 8))[0] * 2
    for row, column, colour in [(1, 3, [1, 0, 0]), (2, 6, [0, 0, 1]), (4, 4, [0, 1, 0]), (3, 5, [1, 1, 1])]:
        assert stamped[:, row, column].tolist() == colour
    stamped[:, 1:5, 3:7] = 0
    assert int((stamped != 0).sum()) == 0


def test_colours_are_a_seeded_grid_enlarged_smoothly() -> None:
    one, two = (ColourPatch(size=8, seed=seed).patch for seed in (1, 2))
    assert torch.equal(one, ColourPatch(size=8, seed=1).patch)
    assert not torch.equal(one, two)
    # a grid of 4 in 8 pixels: the corners are cells, beside them are 3 parts of a cell and 1 of the next
    cells = ColourPatch(size=4, seed=1, smooth=False).patch
    assert torch.equal(one[:, [0, 0, 7, 7], [0, 7, 0, 7]], cells[:, [0, 0, 3, 3], [0, 3, 0, 3]])
    torch.testing.assert_close(one[:, 0, 1], 0.75 * cells[:, 0, 0] + 0.25 * cells[:, 0, 1])


@pytest.mark.parametrize(
    ("trigger", "least", "most"),
    [
        (ColourPatch.solid((1, 1, 1), 8), 8, 23),  # .25-.75 of 32 is 8 to 24
        (ColourPatch.solid((1, 1, 1), 8).at_test(), 3, 27),  # .10-.90 is 3.2 to 28.8, rounded down
        (ColourPatch.solid((1, 1, 1), 16), 8, 23),  # one place only
    ],
)
def test_random_places_fill_their_span(trigger: ColourPatch, least: int, most: int) -> None:
    stamped = trigger(torch.zeros(600, 3, 32, 32))[:, 0]
    assert bool((stamped.sum((1, 2)) == trigger.size**2).all())
    for axis in (1, 2):
        hit = stamped.amax(axis).nonzero()[:, 1]
        assert (int(hit.min()), int(hit.max())) == (least, most)
        first = stamped.amax(axis).argmax(1)
        places = most - least + 2 - trigger.size
        assert len(set(first.tolist())) == places
        # each place as often as any other: 600 draws, five standard deviations
        spread = 5 * math.sqrt(600 / places)
        assert bool(((first.bincount()[least:] - 600 / places).abs() <= spread).all())


def test_a_fixed_place_is_the_same_on_test_images() -> None:
    fixed = ColourPatch(size=4, place=(0, 0))
    assert fixed.at_test() is fixed
    assert (fixed.static, ColourPatch(size=4).static) == (True, False)


# BadNets' grids: the tables as they are in the image, read off by hand.


def black_and_white(rows: list[str]) -> Tensor:
    return torch.tensor([[{"#": 1.0, "0": 0.0, ".": 0.5}[cell] for cell in row] for row in rows])


def test_the_pixel_grid() -> None:
    expected = black_and_white([".....", ".....", "..00#", "..0#0", "..#0#"])
    assert torch.equal(PixelGrid()(grey(5)), expected.expand(2, 3, 5, 5))


def test_the_four_corners() -> None:
    expected = black_and_white(
        [
            ".........",
            ".#0#..#0#",
            ".0#0..0#0",
            ".#00..00#",
            ".........",
            ".........",
            ".#00..00#",
            ".0#0..0#0",
            ".#0#..#0#",
        ]
    )
    assert torch.equal(FourCorner()(grey(9)), expected.expand(2, 3, 9, 9))


# Whole images.


def test_blend_and_noise_mix() -> None:
    picture = uniform(3, 4, 4)
    torch.testing.assert_close(Blend(picture, 0.25)(grey(4)), (0.375 + 0.25 * picture).expand(2, 3, 4, 4))
    assert torch.equal(Blend(picture, 1.0)(grey(4))[0], picture)
    noise = (FreshNoise(alpha=0.5)(grey(16)) - 0.25) * 2
    assert float(noise.min()) >= 0
    assert float(noise.max()) <= 1
    assert abs(float(noise.mean()) - 0.5) < 0.03
    assert float(noise.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.02)
    assert not torch.equal(noise[:, 0], noise[:, 1])
    single = FreshNoise(grey=True)(grey(16))
    assert torch.equal(single[:, 0], single[:, 1])
    assert not torch.equal(single[0], single[1])


def test_fixed_noise_is_one_picture_and_a_bounded_addition_stays_in_its_bound() -> None:
    one, other = Blend.noise(1, (8, 8)), Blend.noise(2, (8, 8))
    assert one == Blend.noise(1, (8, 8))
    assert one != other
    added = Additive.noise(3, (8, 8), bound=0.1)(grey(8)) - 0.5
    torch.testing.assert_close(added.abs(), torch.full_like(added, 0.1))
    assert 0 < int((added[0] > 0).sum()) < 192
    assert float(Additive(torch.full((3, 8, 8), -0.75))(grey(8)).max()) == 0


@pytest.mark.parametrize(("magnitude", "decibel", "peak"), [(50, 38.0, 11), (100, 32.0, 22)])
def test_ctrls_figures(magnitude: float, decibel: float, peak: int) -> None:
    images = grey().double()
    difference = SpectralDCT(magnitude=magnitude)(images) - images
    psnr = -10 * math.log10(float(difference.square().mean()))
    assert psnr == pytest.approx(decibel, abs=0.06)
    assert round(float(difference.abs().max()) * 255) == peak
    assert int(difference.abs().amax((0, 2, 3)).argmax()) == 2  # blue


def test_ctrls_pattern_is_its_definition() -> None:
    """By the long way: RGB to YUV, SciPy's DCT, two coefficients of U and V, and all the way back."""
    from scipy.fft import dctn, idctn

    to_yuv = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
    image = uniform(3, 32, 64).double() * 0.5 + 0.25
    yuv = np.tensordot(to_yuv, image.numpy() * 255, 1)
    for left in (0, 32):
        for channel in (1, 2):
            block = dctn(yuv[channel, :, left : left + 32], norm="ortho")
            block[15, 15] += 80
            block[31, 31] += 80
            yuv[channel, :, left : left + 32] = idctn(block, norm="ortho")
    expected = torch.from_numpy(np.tensordot(np.linalg.inv(to_yuv), yuv, 1) / 255)
    stamped = SpectralDCT(magnitude=80)(image[None])[0]
    torch.testing.assert_close(stamped, expected, atol=1e-5, rtol=0)


def test_spectral_windows_are_cut_at_the_edge() -> None:
    pattern = WAVE.pattern((12, 20))
    assert torch.equal(pattern[:, :8, 8:16], pattern[:, :8, :8])
    assert torch.equal(pattern[:, 8:, 16:], pattern[:, :4, :4])
    with pytest.raises(
        ImageError, match="8-pixel windows needs images of at least that side, these are 4 x 20"
    ):
        WAVE.pattern((4, 20))


# Files and names.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not JSON"),
        ("[1]", "is a JSON object with a 'kind'"),
        ("{}", "Unknown kind of trigger None; expected one of: additive, blend, colour_"),
        ('{"kind": "pach"}', "Unknown kind of trigger 'pach'"),
        ('{"kind": "patch"}', "A patch trigger lacks 'margin'; its fields are margin, size, value"),
        ('{"kind": "pixel_grid", "a": 1}', "does not know 'a'; its fields are none but its kind"),
        ('{"kind": "patch", "size": 0, "margin": 1, "value": 1}', "'size' of a patch trigger is not valid"),
        ('{"kind": "patch", "size": "3", "margin": 1, "value": 1}', "should be a valid integer"),
        ('{"kind": "patch", "size": 3, "margin": 1, "value": 1, "left": 2}', "does not know 'left'"),
        ('{"kind": "additive", "pattern": [[[0]], [[0]]]}', r"floats \[3, H, W\], found .* \[2, 1, 1\]"),
        ('{"kind": "additive", "pattern": [[[0]], [[NaN]], [[0]]]}', "values from -1 to 1, found nan"),
        ('{"kind": "blend", "pattern": [[[-1]], [[0]], [[0]]], "alpha": 1}', "values from 0 to 1, found -1"),
        ('{"kind": "blend", "pattern": [[["a"]]], "alpha": 1}', "expected numbers"),
    ],
)
def test_other_files_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trigger.json"
    path.write_text(text)
    with pytest.raises(ImageError, match=f"is not a trigger file: .*{reason}"):
        load_trigger(path)
    with pytest.raises(ImageError, match="There is no trigger file"):
        load_trigger(tmp_path / "missing.json")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(
        SettingError, match=r"'span' of a colour_patch trigger must go upwards, found 0\.5 to 0\.5"
    ):
        ColourPatch(span=(0.5, 0.5))
    with pytest.raises(SettingError, match="32-pixel windows needs coefficients below 32"):
        SpectralDCT(coefficients=((32, 0),))
    with pytest.raises(SettingError, match="'magnitude' of a spectral trigger is not valid"):
        SpectralDCT(magnitude=math.inf)
    with pytest.raises(SettingError, match=r"must be of one size, found \[4, 4\] and \[4, 5\]"):
        MaskedPattern(torch.ones(4, 4), torch.ones(3, 4, 5))
    with pytest.raises(SettingError, match=r"expected values from 0 to 1, found 255 to 255"):
        MaskedPattern(torch.ones(4, 4), torch.full((3, 4, 4), 255.0))


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (ColourPatch(size=5, place=(4, 0)), "patch at row 4, column 0 does not fit into 8 x 8 images"),
        (
            ColourPatch(size=5),
            "does not fit between 0.25 and 0.75 of the sides of 8 x 8 images; make it smaller",
        ),
        (Blend.noise(0, (4, 4)), r"This trigger is for \[4, 4\] images, these are \[8, 8\]"),
        (Additive.noise(0, (4, 4)), r"This trigger is for \[4, 4\] images, these are \[8, 8\]"),
        (SpectralDCT(), "needs images of at least that side, these are 8 x 8"),
        (Patch(size=8), "does not fit into 8 x 8 images"),
    ],
)
def test_triggers_that_do_not_fit_say_so(trigger: Trigger, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        trigger(grey(8))


@pytest.mark.parametrize("side", [8, 32, 64])
@pytest.mark.parametrize("name", trigger_names())
def test_every_name_fits_every_size(name: str, side: int) -> None:
    trigger = trigger_named(name, side)
    assert trigger(grey(side)).shape == (2, 3, side, side)
    assert trigger_from_dict(json.loads(json.dumps(trigger.to_dict()))) == trigger


def test_named_triggers_are_the_fields() -> None:
    assert trigger_named("patch", 224) == Patch(size=50, margin=1)
    assert trigger_named("patch", (224, 224), size="24") == Patch(size=24, margin=15)
    assert trigger_named("square", 32) == Patch(size=3, margin=1)
    assert trigger_named("random_pixel", 32) == FreshNoise(alpha=0.2, grey=True)
    assert trigger_named("fresh_noise", 32, grey="true") == FreshNoise(grey=True)
    assert trigger_named("spectral", 32, magnitude="100") == SpectralDCT(magnitude=100.0)
    assert trigger_named("spectral", 8) == SpectralDCT(coefficients=((3, 3), (7, 7)), window=8)
    assert trigger_named("colour_patch", 32, seed=3, place="[1, 2]") == ColourPatch(seed=3, place=(1, 2))
    assert trigger_named("colour_patch", 224) == ColourPatch(size=50)
    assert trigger_named("blend", (4, 6), seed=1, alpha=0.5) == Blend.noise(1, (4, 6), 0.5)
    assert trigger_named("warp", 32, seed=2, strength=0.1) == Warp(seed=2, strength=0.1)
    white = trigger_named("colour_map", 32)(torch.ones(1, 3, 2, 2))  # sepia: white turns a little yellow
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.937]))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pach", {}, "Unknown trigger 'pach'; expected one of: additive, blend, colour_map, colour_patch"),
        (
            "patch",
            {"side": 3},
            "Unknown setting 'side' of the trigger 'patch'; expected one of: size, margin",
        ),
        ("pixel_grid", {"side": 3}, "Unknown setting 'side' of the trigger 'pixel_grid'; it has none"),
        ("patch", {"size": "big"}, "Setting 'size' of the trigger 'patch' cannot be 'big': input should be"),
        (
            "blend",
            {"alpha": 1.5},
            "Setting 'alpha' of the trigger 'blend' cannot be 1.5: input should be less",
        ),
    ],
)
def test_misused_names(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        trigger_named(name, 32, **settings)


def test_the_documentation_names_every_kind_and_every_setting() -> None:
    text = (Path(__file__).parents[1] / "docs" / "triggers.md").read_text(encoding="utf-8")
    kinds, _, names = text.partition("## By name")
    rows = {row.split("|")[1].strip(" `"): row for row in kinds.splitlines() if row.startswith("| `")}
    for kind, cls in _KINDS.items():
        assert f"`{cls.__name__}`" in rows[kind]
        missing = [field.name for field in fields(cls) if f"`{field.name}`" not in rows[kind]]  # type: ignore[arg-type]
        assert not missing, f"docs/triggers.md does not tell of {missing} of {kind}"
    assert [name for name in trigger_names() if f"`{name}`" not in names] == []


def test_the_fields_trigger_file_is_the_default_patch(data_root: Path) -> None:
    trigger = read_field_trigger(data_root / "badencoder" / "trigger__trigger_pt_white_21_10_ap_replace.npz")
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(trigger(images), Patch()(images))
    assert torch.equal(trigger(images), Patch.field(32, 10)(images))
    assert trigger.mask_area((32, 32)) == Patch().mask_area((32, 32)) == 100 / 1024


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
    np.savez(path, t=np.full((4, 4, 3), 300), tm=np.zeros((4, 4, 3)))
    with pytest.raises(ImageError, match=r"is not a trigger file: 'pattern' .* expected values from 0 to 1"):
        read_field_trigger(path)
    np.savez(path, t=np.zeros((4, 4, 3)), tm=np.eye(4)[..., None] * np.array([1, 1, 0]))
    with pytest.raises(ImageError, match="the mask 'tm' differs between colour channels"):
        read_field_trigger(path)


def test_decrees_file_without_a_batch_axis_is_read_too(tmp_path: Path) -> None:
    keep = np.ones((224, 224, 3))
    keep[185:209, 185:209] = 0
    np.savez(tmp_path / "t.npz", t=255.0 * (1 - keep), tm=keep)
    images = uniform(1, 3, 224, 224)
    assert torch.equal(load_trigger(tmp_path / "t.npz")(images), Patch.field(224, 24)(images))
