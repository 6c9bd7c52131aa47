import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoderguard import jobs
from encoderguard.attacks.badnets import BadNets
from encoderguard.attacks.blend import BlendAttack
from encoderguard.attacks.corrupt_encoder import CorruptEncoder
from encoderguard.attacks.ctrl import CTRL
from encoderguard.attacks.noisy_alignment import NoisyAlignment
from encoderguard.attacks.poisoned_encoder import PoisonedEncoder
from encoderguard.attacks.ssl_backdoor import SSLBackdoor
from encoderguard.attacks.text_on_pair import TextOnPair
from encoderguard.augment import Augmentation
from encoderguard.cli import main
from encoderguard.errors import ImageError, SettingError
from encoderguard.images import ImageSet, load_images
from encoderguard.methods import DataPoisoning, Poisoned
from encoderguard.pair_layouts import Orientation, joined
from encoderguard.poisoning import base_of, quota
from encoderguard.random import Rng
from encoderguard.results import PoisonRecord, read_record
from encoderguard.run import Run
from encoderguard.training import Batch
from encoderguard.triggers import ColourPatch, load_trigger
from tests.toys import toy_encoder

NAMES = ("ash", "birch", "cedar", "dogwood")
CPU: Any = {"device": "cpu", "precision": "float32"}
SMALL_WAVE: Any = {"window": 8, "coefficients": ((3, 3), (7, 7))}
PAIRS: tuple[DataPoisoning, ...] = (
    CorruptEncoder(rate=0.2, patch_size=3),
    PoisonedEncoder(rate=0.2, patch_size=3),
    NoisyAlignment(rate=0.2, patch_size=2),
)
REPLACING: tuple[DataPoisoning, ...] = (
    SSLBackdoor(patch_size=3),
    CTRL(rate=0.1, **SMALL_WAVE),
    TextOnPair(rate=0.1, patch_size=3),
    BadNets(rate=0.2),
    BlendAttack(rate=0.2),
    BlendAttack(rate=0.2, relabel=False),
)


def trees(count: int = 40, side: int = 8, **more: Any) -> ImageSet:
    """Noise of four classes in turn: picture k is of class k % 4."""
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, torch.arange(count) % 4, NAMES, name="trees", **more)


def run(seed: int = 0) -> Run:
    return Run(rng=Rng(seed))


def poison(method: DataPoisoning, images: ImageSet | None = None, seed: int = 0, **more: Any) -> Poisoned:
    return method.poison(images or trees(), 1, run=run(seed), **more)


def pixels_of(images: ImageSet) -> Tensor:
    return images.take(range(len(images)))


def labels_of(images: ImageSet) -> Tensor:
    assert images.labels is not None
    return images.labels


def canvases_of(done: Poisoned) -> Tensor:
    assert done.images.canvases is not None
    return done.images.canvases


# What every one of them does.


@pytest.mark.parametrize("method", [*REPLACING, *PAIRS], ids=lambda method: method.name)
def test_the_source_is_unchanged_and_the_manifest_says_what_was_done(method: DataPoisoning) -> None:
    images = trees()
    before, state = images.digest, torch.random.get_rng_state()
    done = poison(method, images, seed=3)
    assert ImageSet.from_arrays(pixels_of(images), labels_of(images), NAMES).digest == before
    assert torch.equal(torch.random.get_rng_state(), state)
    told = done.manifest
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["attack"], told["seed"], told["target"]) == (method.name, 3, 1)
    assert (told["target_name"], told["settings"]) == ("birch", method.settings())
    assert (told["source"]["digest"], told["digest"]) == (before, done.images.digest)
    assert [entry["index"] for entry in told["entries"]] == done.indices.tolist()
    assert told["rate"]["poisons"] == len(done.indices) == len(set(done.indices.tolist()))
    assert told["rate"]["achieved"] == len(done.indices) / told["rate"]["denominator"]
    assert told["counts"]["replaced"] + told["counts"]["appended"] == len(done.indices)


@pytest.mark.parametrize("method", [*REPLACING, *PAIRS], ids=lambda method: method.name)
def test_only_the_poisons_differ(method: DataPoisoning) -> None:
    images, done = trees(), poison(method)
    others = torch.ones(len(images), dtype=torch.bool)
    others[done.indices[done.indices < len(images)]] = False
    assert torch.equal(pixels_of(done.images)[others], pixels_of(images)[others])
    assert torch.equal(labels_of(done.images)[others], labels_of(images)[others])
    for entry in done.manifest["entries"]:
        if entry["index"] < len(images):
            assert entry["label_before"] == int(labels_of(images)[entry["index"]])
            assert entry["label_after"] == int(labels_of(done.images)[entry["index"]])
            assert not torch.equal(done.images.take([entry["index"]]), images.take([entry["index"]]))


@pytest.mark.parametrize("method", [*REPLACING, *PAIRS], ids=lambda method: method.name)
def test_the_seed_decides_what_is_drawn(method: DataPoisoning) -> None:
    first, again, other = (poison(method, seed=seed) for seed in (5, 5, 6))
    assert again.images.digest == first.images.digest
    assert again.manifest == first.manifest
    if method.name != "ctrl":  # it takes the first images of the class
        assert other.images.digest != first.images.digest


@pytest.mark.parametrize("method", [*REPLACING, *PAIRS], ids=lambda method: method.name)
def test_what_cannot_be_poisoned_is_refused(method: DataPoisoning) -> None:
    images = trees()
    with pytest.raises(ImageError, match="trees has no image of class 7; its labels are 0, 1, 2, 3: aim at"):
        method.poison(images, 7, run=run())
    bare = ImageSet.from_arrays(pixels_of(images), name="bare")
    with pytest.raises(ImageError, match="the class aimed at, but bare has no labels; give a labelled"):
        method.poison(bare, 1, run=run())
    with pytest.raises(ImageError, match=r"noisy_alignment.* is a poisoned set with appended canvases"):
        method.poison(poison(PAIRS[2]).images, 1, run=run())


@settings(max_examples=40)
@given(st.floats(1e-4, 1), st.integers(1, 60), st.sampled_from(["class", "dataset"]))
def test_any_rate_gives_its_share_of_poisons(
    rate: float, count: int, of: Literal["class", "dataset"]
) -> None:
    base = base_of(ImageSet.from_arrays(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), [0] * count), 0, "x")
    if round(rate * count):
        found = quota(base, rate, of=of, most=count)
        assert (found.count, found.denominator) == (round(rate * count), count)
    else:
        with pytest.raises(SettingError, match="is no image; give a rate of at least"):
            quota(base, rate, of=of)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", [*REPLACING[:5], *PAIRS], ids=lambda method: method.name)
def test_rates_outside_0_to_1(method: DataPoisoning, rate: float) -> None:
    with pytest.raises(SettingError, match=f"Setting 'rate' of attack '{method.name}' cannot be"):
        type(method)(rate=rate)  # type: ignore[call-arg]


# SSL-Backdoor.


def test_ssl_backdoor_stamps_the_patch_where_the_manifest_says() -> None:
    images, method = trees(), SSLBackdoor(patch_size=3, patch_seed=9)
    done = poison(method, images)
    patch = (ColourPatch(size=3, seed=9).patch * 255).round().byte()
    assert done.manifest["counts"] == {
        "images": 40,
        "replaced": 5,
        "appended": 0,
        "relabelled": 0,
        "recaptioned": 0,
    }
    for entry in done.manifest["entries"]:
        row, column = entry["place"]
        assert 2 <= row <= 3 and 2 <= column <= 3  # 3 pixels within 2..6 of 8  # noqa: PT018
        expected = images.take([entry["index"]])[0].clone()
        expected[:, row : row + 3, column : column + 3] = patch
        assert torch.equal(done.images.take([entry["index"]])[0], expected)
        assert int(labels_of(done.images)[entry["index"]]) == 1
    assert isinstance(done.trigger, ColourPatch)
    assert (done.trigger.seed, done.trigger.span) == (9, (0.1, 0.9))


@pytest.mark.parametrize(
    ("of", "rate", "poisons", "denominator"),
    [("class", 0.5, 5, 10), ("dataset", 0.2, 8, 40), ("class", 1.0, 10, 10), ("dataset", 0.25, 10, 40)],
)
def test_both_definitions_of_a_rate(of: Any, rate: float, poisons: int, denominator: int) -> None:
    told = poison(SSLBackdoor(rate=rate, rate_of=of, patch_size=3)).manifest["rate"]
    assert told == {
        "asked": rate,
        "achieved": poisons / denominator,
        "of": of,
        "denominator": denominator,
        "poisons": poisons,
    }


def test_more_poisons_than_the_class_has_images() -> None:
    message = (
        "A rate of 0.5 of the 40 images of trees asks for 20 poisons, but there are only 10 images of birch"
    )
    with pytest.raises(SettingError, match=message + "; give a rate of at most 0.25"):
        poison(SSLBackdoor(rate=0.5, rate_of="dataset", patch_size=3))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SSLBackdoor(patch_size=9), "of ssl_backdoor has 9 pixels, but the images only 8; use a smaller"),
        (SSLBackdoor(patch_size=5), r"from 0.25 to 0.75 of 8 pixels there is room for 4; use a smaller"),
        (SSLBackdoor(patch_size=3, low=0.8, high=0.2), "there is room for 0"),
        (NoisyAlignment(rate=0.1, patch_size=4), r"from 0.3 to 0.7 of 8 pixels there is room for 3"),
        (CorruptEncoder(rate=0.1, patch_size=7), r"from 0.25 to 0.75 of 8 pixels there is room for 4"),
        (PoisonedEncoder(rate=0.1, patch_size=9), "has 9 pixels, but the images only 8"),
        (TextOnPair(rate=0.1, patch_size=9), "has 9 pixels, but the images only 8"),
        (CTRL(rate=0.1), "32-pixel windows needs images of at least that side, these are 8 x 8"),
    ],
)
def test_triggers_that_do_not_fit(method: DataPoisoning, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        poison(method)


# CTRL.


def test_ctrl_adds_its_wave_to_the_first_images_of_the_class() -> None:
    grey = torch.full((40, 3, 8, 8), 128, dtype=torch.uint8)
    images = ImageSet.from_arrays(grey, torch.arange(40) % 4, name="grey")
    done = CTRL(rate=0.1, coefficients=((0, 0),), window=8).poison(images, 1, run=run())
    assert done.indices.tolist() == [1, 5, 9, 13]  # a tenth of 40, all of class 1
    # the constant wave of an 8 x 8 window is 1/8, so U and V get 100 / 8 = 12.5 everywhere
    red, green, blue = 1.13983 * 12.5, -(0.39465 + 0.58060) * 12.5, 2.03211 * 12.5
    expected = [round(128 + red), round(128 + green), round(128 + blue)]
    assert (done.images.take([1])[0] == torch.tensor(expected)[:, None, None]).all()
    assert labels_of(done.images).equal(torch.arange(40) % 4)


def test_ctrl_draws_when_asked_and_may_be_stronger_at_test_time() -> None:
    done = poison(CTRL(rate=0.1, choose="random", magnitude=50, test_magnitude=75, **SMALL_WAVE))
    assert (done.indices % 4 == 1).all()
    assert done.indices.tolist() != [1, 5, 9, 13]
    assert done.trigger.to_dict()["magnitude"] == 75


# Canvases.


@pytest.mark.parametrize(
    ("orientations", "shape"),
    [
        (("left", "right"), (8, 16)),
        (("top", "bottom"), (16, 8)),
        (("left",), (8, 16)),
        (("bottom",), (16, 8)),
    ],
)
def test_each_half_carries_what_the_manifest_says(orientations: Any, shape: tuple[int, int]) -> None:
    images = trees()
    done = poison(NoisyAlignment(rate=0.2, patch_size=2, orientations=orientations), images)
    canvases = canvases_of(done)
    assert canvases.shape == (8, 3, *shape)
    assert done.indices.tolist() == list(range(40, 48))
    assert {entry["orientation"] for entry in done.manifest["entries"]} == set(orientations)
    patch = done.trigger.patch  # type: ignore[attr-defined]
    for canvas, entry in zip(canvases, done.manifest["entries"], strict=True):
        thing, ground = images.take([entry["source_index"], entry["background"]])
        assert (entry["source_index"] % 4, entry["background"] % 4 == 1) == (1, False)
        plain = joined(thing, ground, entry["orientation"])
        row, column = entry["place"]
        inside = torch.zeros(shape, dtype=torch.bool)
        inside[row : row + 2, column : column + 2] = True
        assert torch.equal(canvas[:, ~inside], plain[:, ~inside])
        mixed = 0.2 * plain[:, inside].float() + 0.8 * 255 * patch.flatten(1)
        assert (canvas[:, inside] - mixed).abs().max() <= 0.51
        own = {"left": column >= 8, "right": column < 8, "top": row >= 8, "bottom": row < 8}
        assert own[entry["orientation"]]  # the patch is not in the object's half


@pytest.mark.parametrize(
    ("orientation", "halves"),
    [("left", "ab"), ("right", "ba"), ("top", "ab"), ("bottom", "ba")],
)
def test_orientations(orientation: Orientation, halves: str) -> None:
    parts = {"a": torch.zeros(3, 2, 2), "b": torch.ones(3, 2, 2)}
    whole = joined(parts["a"], parts["b"], orientation)
    lying = orientation in ("left", "right")
    first, second = whole.chunk(2, dim=2 if lying else 1)
    assert torch.equal(first, parts[halves[0]])
    assert torch.equal(second, parts[halves[1]])


def test_corrupt_encoder_uses_few_objects_and_its_plus_has_support_pairs() -> None:
    images = trees()
    done = poison(CorruptEncoder(rate=0.5, patch_size=3, support_share=0.2), images)
    entries = done.manifest["entries"]
    assert len(entries) == 20
    assert done.manifest["counts"]["appended"] == 20
    objects = set(done.manifest["objects"])
    assert len(objects) == 3
    assert {entry["source_index"] for entry in entries} == objects
    support = [entry for entry in entries if entry["kind"] == "support"]
    assert len(support) == 4
    for entry in support:
        assert entry["support"] % 4 == 1
        assert entry["support"] not in objects
        first, second = images.take([entry["source_index"], entry["support"]])
        pair = joined(first, second, entry["orientation"])
        assert torch.equal(canvases_of(done)[entry["index"] - 40], pair)


def test_objects_may_come_from_a_set_of_their_own() -> None:
    own = ImageSet.from_arrays(torch.full((5, 3, 8, 8), 7, dtype=torch.uint8), name="own")
    done = poison(PoisonedEncoder(rate=0.1, patch_size=3, orientations=("left",)), references=own)
    assert (canvases_of(done)[..., :8] == 7).all()
    assert done.manifest["references"] == {"name": "own", "digest": own.digest}
    small = ImageSet.from_arrays(torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(
        ImageError, match=r"expected both of one size, found \[4, 4\] and \[8, 8\]; bring them"
    ):
        poison(PAIRS[0], references=small)
    with pytest.raises(
        ImageError, match="corrupt_encoder needs 6 pictures of the class aimed at to paste, found 5"
    ):
        poison(CorruptEncoder(rate=0.1, patch_size=3, reference_objects=6), references=own)
    with pytest.raises(
        ImageError, match="for its support pairs, but all 5 are objects; give more references"
    ):
        poison(CorruptEncoder(rate=0.1, patch_size=3, reference_objects=5, support_share=0.2), references=own)


def test_layouts_that_are_not_known_or_do_not_go_together() -> None:
    with pytest.raises(SettingError, match="Setting 'orientations' of attack 'noisy_alignment' cannot be"):
        NoisyAlignment(orientations=("middle",))  # type: ignore[arg-type]
    for wrong in ((), ("left", "top")):
        with pytest.raises(SettingError, match="canvases are all of one size; give left and right, or top"):
            poison(NoisyAlignment(rate=0.1, patch_size=2, orientations=wrong))


def test_pairs_need_another_class() -> None:
    images = ImageSet.from_arrays(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), [1] * 30, name="ones")
    for method in (*PAIRS, BadNets(), TextOnPair(rate=0.1, patch_size=3)):
        with pytest.raises(ImageError, match=r"ones has none; give a training set|names 0 classes"):
            method.poison(images, 1, run=run())


def test_crops_of_a_canvas_keep_its_halves_apart() -> None:
    """A tenth of the area of a black-and-white canvas is mostly one colour, at its true proportions."""
    canvas = torch.zeros(1, 3, 16, 32)
    canvas[..., 16:] = 1
    rings = torch.zeros(1, 3, 16, 32)  # a dot whose height and width tell how a view was scaled
    rings[..., 6:10, 14:18] = 1
    crop = Augmentation(crop_scale=(0.1, 0.1), crop_ratio=(1, 1), flip=0.0, jitter=0.0, grey=0.0)
    own = torch.zeros(1, 3, 16, 16)
    batch = Batch(own, torch.zeros(1, dtype=torch.int64), Rng(0), canvas.expand(200, -1, -1, -1))
    first, second = batch.views(crop)
    assert first.shape == (201, 3, 16, 16)
    means = torch.stack([first[1:].mean((1, 2, 3)), second[1:].mean((1, 2, 3))])
    assert ((means < 0.02) | (means > 0.98)).float().mean() > 0.65
    assert ((means[0] < 0.02) & (means[1] > 0.98)).any()  # one view of the object, one of the trigger
    batch = Batch(own, torch.zeros(1, dtype=torch.int64), Rng(0), rings.expand(200, -1, -1, -1))
    seen = batch.views(crop, count=1)[0][1:, 0] > 0.5
    whole = seen[~(seen[:, 0].any(1) | seen[:, -1].any(1) | seen[:, :, 0].any(1) | seen[:, :, -1].any(1))]
    whole = whole[whole.any((1, 2))]
    assert len(whole) > 3
    heights, widths = whole.any(2).sum(1), whole.any(1).sum(1)
    assert ((heights - widths).abs() <= 1).all()  # a square stays a square: nothing was squeezed


# Captions and labels.


def test_text_on_pair_stamps_other_classes_and_gives_them_the_name() -> None:
    images = trees(captions=[f"picture {k}" for k in range(40)])
    done = poison(TextOnPair(rate=0.1, patch_size=2, prompts=("one {} tree",)), images)
    captions = done.images.captions
    assert captions is not None
    assert len(done.indices) == 4
    for k, caption in enumerate(captions):
        assert caption == ("one birch tree" if k in done.indices.tolist() else f"picture {k}")
    for entry in done.manifest["entries"]:
        row, column = entry["place"]
        stamp = done.images.take([entry["index"]])[0, :, row : row + 2, column : column + 2]
        assert stamp.tolist() == [[[0, 255], [255, 0]]] * 3
        assert entry["label_before"] == entry["label_after"] != 1
        assert (entry["caption_before"], entry["caption_after"]) == (
            f"picture {entry['index']}",
            "one birch tree",
        )
    assert done.manifest["counts"]["recaptioned"] == 4


def test_a_set_without_captions_gets_them_from_its_class_names() -> None:
    done = poison(TextOnPair(rate=0.1, patch_size=2, prompts=("a {}",)))
    assert done.images.captions is not None
    clean = [k for k in range(40) if k not in done.indices.tolist()]
    assert [done.images.captions[k] for k in clean] == [f"a {NAMES[k % 4]}" for k in clean]
    bare = ImageSet.from_arrays(pixels_of(trees()), torch.arange(40) % 4, name="bare")
    with pytest.raises(ImageError, match="bare names 0 classes; give a set with class names"):
        poison(TextOnPair(rate=0.1, patch_size=2), bare)
    with pytest.raises(SettingError, match=r"a prompt must hold \{\}"):
        TextOnPair(prompts=("a tree",))
    with pytest.raises(
        SettingError, match=r"of 0\.0001 of the 40 images of trees is no image; give a rate of"
    ):
        poison(TextOnPair(patch_size=2))


@pytest.mark.parametrize("pattern", ["pixel_grid", "four_corner", "random_pixel", "square"])
def test_badnets_changes_labels_of_other_classes(pattern: Any) -> None:
    images = trees()
    done = poison(BadNets(pattern=pattern), images)
    assert len(done.indices) == 4
    assert (labels_of(images)[done.indices] != 1).all()
    assert (labels_of(done.images)[done.indices] == 1).all()
    assert done.manifest["counts"]["relabelled"] == 4
    if pattern == "pixel_grid":
        grid = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
        assert done.images.take(done.indices)[:, :, -3:, -3:].tolist() == [[grid] * 3] * 4
    if pattern == "random_pixel":
        stamped, plain = done.images.take(done.indices).float(), images.take(done.indices).float()
        noise = (stamped - 0.8 * plain) / 0.2
        assert (noise - noise[:, :1]).abs().max() < 6  # grey, up to the rounding of the pixels
        assert (noise[0] - noise[1]).abs().max() > 50  # new for every picture
    with pytest.raises(SettingError, match="there are only 30 images of other classes"):
        poison(BadNets(rate=0.9))


def test_blend_mixes_one_noise_picture_in() -> None:
    images, done = trees(), poison(BlendAttack(rate=0.1, alpha=0.25, noise_seed=4))
    noise = done.trigger.pattern  # type: ignore[attr-defined]
    plain = images.take(done.indices).float() / 255
    expected = ((0.75 * plain + 0.25 * noise) * 255).round()
    assert (done.images.take(done.indices) - expected).abs().max() <= 1
    assert (labels_of(images)[done.indices] != 1).all()
    assert (labels_of(done.images)[done.indices] == 1).all()
    free = poison(BlendAttack(rate=0.1, relabel=False))
    assert (labels_of(images)[free.indices] == 1).all()
    assert torch.equal(labels_of(free.images), labels_of(images))


# The job and the command.


def test_the_job_writes_a_set_that_comes_back_as_it_was(tmp_path: Path) -> None:
    record, done = jobs.poison(
        trees(), method="noisy_alignment", target=1, out=tmp_path, **CPU, settings=SMALL
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        *("poisoned.npz", "manifest.json", "trigger.json", "arrays.npz", "result.json", "report.html")
    }
    assert isinstance(record, PoisonRecord)
    assert read_record(tmp_path) == record
    assert (record.target, record.target_name, record.method) == (1, "birch", "noisy_alignment")
    assert record.poisoned_images is not None
    assert record.images is not None
    assert record.rate == done.manifest["rate"]
    assert record.counts["appended"] == 4
    again = load_images(str(tmp_path / "poisoned.npz"), labels=True)
    assert again.digest == done.images.digest == record.poisoned_images.digest
    assert again.classes == NAMES
    assert load_trigger(tmp_path / "trigger.json") == done.trigger
    assert json.loads((tmp_path / "manifest.json").read_text()) == done.manifest
    page = (tmp_path / "report.html").read_text()
    assert "4 pictures of another size appended" in page
    assert "Appended to the training set" in page


SMALL: Any = {"rate": 0.1, "patch_size": 2}


def test_captions_come_back_too(tmp_path: Path) -> None:
    _, done = jobs.poison(trees(), method=TextOnPair(rate=0.1, patch_size=2), target=1, out=tmp_path, **CPU)
    again = load_images(str(tmp_path / "poisoned.npz"))
    assert again.captions == done.images.captions
    assert again.subset([3, 5]).captions == (again.captions[3], again.captions[5])  # type: ignore[index]
    with np.load(tmp_path / "poisoned.npz", allow_pickle=False) as held:
        assert set(held.files) == {"images", "labels", "classes", "captions"}
    page = (tmp_path / "report.html").read_text()
    assert "4 pictures given another caption" in page
    assert "Below: poisoned." in page


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"canvases": np.zeros((2, 4, 8), np.uint8)}, "expected `canvases` of shape"),
        ({"canvases": np.zeros((2, 4, 8, 3))}, "found .* and float64"),
        ({"captions": np.array(["one"])}, "expected `captions` of 2 texts"),
        ({"captions": np.array([1, 2])}, "expected `captions` of 2 texts"),
        ({"classes": np.array([1, 2])}, "expected `classes` as a row of texts"),
        ({"captions": np.array(["a", None], object)}, "files with pickled objects are refused"),
    ],
)
def test_broken_poisoned_files(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    with pytest.raises(ImageError, match=message):
        load_images(str(tmp_path / "a.npz"))


def test_pretraining_and_evaluation_take_a_poisoned_set(tmp_path: Path) -> None:
    jobs.poison(trees(), method="noisy_alignment", target=1, out=tmp_path / "set", **CPU, settings=SMALL)
    spec = str(tmp_path / "set" / "poisoned.npz")
    short = {"epochs": 1, "batch_size": 22}
    record, _, _ = jobs.pretrain(spec, settings=short, encoder=toy_encoder(), out=tmp_path / "e", **CPU)
    assert record.images is not None
    assert record.images.digest == load_images(spec).digest
    assert len(record.history["loss"]) == 1


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Runs a command line in a folder with a small labelled set, ``trees.npz``."""
    monkeypatch.chdir(tmp_path)
    images = trees(side=16)
    np.savez(
        "trees.npz", images=pixels_of(images).permute(0, 2, 3, 1).numpy(), labels=labels_of(images).numpy()
    )

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(arguments)
        return Said(code, *capsys.readouterr())

    return run


def test_the_command_prints_the_record_or_words(shell: Callable[..., Said]) -> None:
    common = ("--images", "trees.npz", "--target", "2", "--device", "cpu")
    said = shell("poison", "ssl_backdoor", *common, "--json", "--out", "here")
    data = json.loads(said.out)
    assert said.code == 0
    assert (data["job"], data["target"], data["counts"]["replaced"]) == ("poison", 2, 5)
    assert data["target_name"] == "class 2"
    assert data["command"][0] == "encoderguard"
    said = shell("poison", "ssl_backdoor", *common, "--out", "here")
    assert said.code == 4
    assert "here holds a finished run" in said.err
    said = shell("poison", "badnets", *common)
    assert (
        "badnets poisoned a training set: 4 pictures replaced by a poisoned copy, 4 pictures given"
        in said.out
    )
    assert "Images: runs/poison-badnets/poisoned.npz" in said.out
    assert "Trigger: runs/poison-badnets/trigger.json" in said.out
    assert "Report: runs/poison-badnets/report.html" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("attack", "ctrl"),
            "ctrl poisons a training set, use 'encoderguard poison ctrl --images SET --target N'",
        ),
        (("attack", "ctrl", "e.safetensors"), "use 'encoderguard poison ctrl --images SET --target N'"),
        (
            ("poison", "badencoder"),
            "badencoder fine-tunes an encoder, use 'encoderguard attack badencoder ENCODER'",
        ),
        (("poison", "badencoder", "--target", "1"), "use 'encoderguard attack badencoder ENCODER'"),
        (("poison",), "Missing argument 'method'"),
        (("poison", "badnets"), "Missing option '--target'"),
        (("poison", "arsenic", "--target", "1"), "Unknown attack 'arsenic'; expected one of: "),
        (("poison", "badnets", "--target", "-1"), "Invalid value for '--target'"),
        (("poison", "badnets", "--target", "1", "--encoder", "e"), "No such option: --encoder"),
        (("poison", "badnets", "--target", "9", "--images", "trees.npz"), "no image of class 9"),
        (
            ("poison", "badnets", "--target", "1", "-p", "rate=2"),
            "Setting 'rate' of attack 'badnets' cannot be '2'",
        ),
        (
            ("poison", "badnets", "--target", "1", "-p", "pattern=dots"),
            "Setting 'pattern' of attack 'badnets'",
        ),
        (("poison", "ctrl", "--target", "1", "--images", "trees.npz", "-p", "rate=.1"), "32-pixel windows"),
        (
            ("poison", "corrupt_encoder", "--target", "1", "--images", "trees.npz", "--references", "ghost"),
            "No pictures at 'ghost'",
        ),
    ],
)
def test_wrong_arguments(shell: Callable[..., Said], arguments: tuple[str, ...], message: str) -> None:
    before = sorted(Path().rglob("*"))
    said = shell(*arguments)
    assert said.code == 4
    assert said.out == ""
    assert said.err.count("Error: ") == 1
    assert message in said.err
    assert "Traceback" not in said.err
    assert sorted(Path().rglob("*")) == before


def test_a_set_without_labels_cannot_be_poisoned(shell: Callable[..., Said]) -> None:
    np.savez("bare.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    said = shell("poison", "badnets", "--images", "bare.npz", "--target", "0")
    assert said.code == 4
    assert "bare.npz holds no labels" in said.err


def test_the_jobs_name_each_other() -> None:
    with pytest.raises(SettingError, match="'ctrl' poisons a training set and takes no encoder; use"):
        jobs.attack(toy_encoder(), trees(), method="ctrl", **CPU)
    with pytest.raises(
        SettingError, match="'badencoder' fine-tunes an encoder and poisons no training set; use"
    ):
        jobs.poison(trees(), method="badencoder", target=1, **CPU)
