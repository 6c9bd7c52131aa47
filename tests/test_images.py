"""Every source of pictures gives the same type: uint8 tensors in a fixed order, a digest, clear errors."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoderguard import image_sources, image_view, images
from encoderguard.errors import ImageError
from encoderguard.images import ImageSet, load_images
from encoderguard.random import Rng

DATA = Path(os.environ.get("ENCODERGUARD_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data")))
NAMES = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})


def pixels(count: int, height: int = 6, width: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def encode(image: torch.Tensor, kind: str = "PNG") -> bytes:
    target = io.BytesIO()
    picture(image).save(target, kind)
    return target.getvalue()


def folder(path: Path, values: torch.Tensor, names: list[str]) -> Path:
    for name, image in zip(names, values, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode(image))
    return path


def shard(path: Path, values: torch.Tensor, labels: list[int] | None = None, group: int = 4) -> Path:
    rows = [{"bytes": encode(image), "path": None} for image in values]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, Any] = {"image": pa.array(rows, kind)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata({"huggingface": NAMES})
    pq.write_table(table, path, row_group_size=group)
    return path


def everything(images: ImageSet) -> torch.Tensor:
    return images.take(range(len(images)))


class TestArrays:
    def test_take_keeps_order_and_repeats(self) -> None:
        values = pixels(4)
        images = ImageSet.from_arrays(values, [0, 1, 1, 0], ("cat", "dog"), name="toy")
        assert torch.equal(images.take([3, 0, 3]), values[[3, 0, 3]])
        assert images.take([]).shape == (0, 3, 6, 5)
        assert (len(images), images.shape, images.name, images.classes) == (4, (6, 5), "toy", ("cat", "dog"))
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 1, 0]

    def test_taken_pixels_are_a_copy(self) -> None:
        images = ImageSet.from_arrays(pixels(2))
        before = images.take([0])
        images.take([0]).zero_()
        assert torch.equal(images.take([0]), before)

    def test_float_batches_cover_0_to_1(self) -> None:
        values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
        images = ImageSet.from_arrays(values)
        batches = list(images.float_batches(2))
        assert [len(batch) for batch in batches] == [2, 1]
        assert torch.cat(batches)[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
        assert batches[0].dtype == torch.float32
        assert [float(batch[0, 0, 0, 0]) for batch in images.float_batches(1, indices=[2, 0])] == [1.0, 0.0]

    def test_read_only_numpy_is_accepted(self) -> None:
        values = pixels(2).numpy()
        values.setflags(write=False)
        assert torch.equal(everything(ImageSet.from_arrays(values)), pixels(2))

    @pytest.mark.parametrize(
        ("wrong", "found"),
        [
            (torch.zeros(2, 3, 4, 4), r"shape \(2, 3, 4, 4\) and type float32"),
            (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"shape \(2, 4, 4, 3\) and type uint8"),
            (np.zeros((0, 3, 4, 4), np.uint8), r"shape \(0, 3, 4, 4\)"),
            (np.empty((1, 3, 4, 4), object), "type object"),
        ],
    )
    def test_wrong_arrays_are_named(self, wrong: Any, found: str) -> None:
        with pytest.raises(ImageError, match=f"Expected uint8 images of shape.*{found}"):
            ImageSet.from_arrays(wrong)

    @pytest.mark.parametrize(
        ("labels", "classes", "message"),
        [
            ([0], (), r"expected 2 integer labels, found shape \(1,\)"),
            ([0.0, 1.0], (), "found shape .* and type float64"),
            ([0, -1], (), "label -1 marks an unlabelled image"),
            ([0, 2], ("cat", "dog"), "label 2 has no name, there are 2 class names"),
        ],
    )
    def test_wrong_labels_are_named(self, labels: list[Any], classes: tuple[str, ...], message: str) -> None:
        with pytest.raises(ImageError, match=message):
            ImageSet.from_arrays(pixels(2), labels, classes)

    @pytest.mark.parametrize("wrong", [[4], [-1], torch.tensor([0.0]), torch.tensor([True, False])])
    def test_wrong_indices_are_refused(self, wrong: Any) -> None:
        images = ImageSet.from_arrays(pixels(4))
        with pytest.raises(ImageError, match="indices"):
            images.take(wrong)

    def test_wrong_batch_size_is_refused_at_the_call(self) -> None:
        with pytest.raises(ImageError, match="batch size of at least 1, found 0"):
            ImageSet.from_arrays(pixels(1)).float_batches(0)


class TestParts:
    def test_subset_is_in_the_asked_order_with_its_labels(self) -> None:
        values = pixels(5)
        part = ImageSet.from_arrays(values, range(5)).subset([4, 1, 2]).subset(torch.tensor([2, 0]))
        assert torch.equal(everything(part), values[[2, 4]])
        assert part.labels is not None
        assert part.labels.tolist() == [2, 4]

    def test_digest_of_a_part_is_over_its_content(self) -> None:
        values = pixels(5)
        whole = ImageSet.from_arrays(values)
        assert whole.subset(range(5)).digest == whole.digest
        assert whole.subset([3, 1]).digest == ImageSet.from_arrays(values[[3, 1]]).digest
        assert whole.subset([3, 1]).digest != whole.subset([1, 3]).digest

    def test_sample_is_a_function_of_the_seed(self) -> None:
        images = ImageSet.from_arrays(pixels(50))
        first = images.sample(10, Rng(1))
        assert first.digest == images.sample(10, Rng(1)).digest
        assert first.digest != images.sample(10, Rng(2)).digest
        assert len({tuple(image.flatten().tolist()) for image in everything(first)}) == 10

    def test_sample_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        ImageSet.from_arrays(pixels(5)).sample(2, Rng(0))
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("n", [0, 6])
    def test_sample_says_how_many_there_are(self, n: int) -> None:
        with pytest.raises(ImageError, match=f"draw 1 to 5 images, all that toy has; asked for {n}"):
            ImageSet.from_arrays(pixels(5), name="toy").sample(n, Rng(0))

    def test_empty_part_is_refused(self) -> None:
        with pytest.raises(ImageError, match="needs at least one image"):
            ImageSet.from_arrays(pixels(5)).subset([])


class TestFolder:
    def test_nested_files_come_in_sorted_order(self, tmp_path: Path) -> None:
        names = ["b/x.png", "a/10.png", "a/9.PNG", "b/deep/y.png"]
        folder(tmp_path, pixels(4), names)
        for ignored in (".DS_Store", "notes.txt", "b/index.json", ".hidden/z.png", "b/.z.png"):
            (tmp_path / ignored).parent.mkdir(exist_ok=True)
            (tmp_path / ignored).write_text("no picture")
        images = load_images(str(tmp_path), labels=True)
        assert torch.equal(everything(images), pixels(4)[[1, 2, 3, 0]])
        assert images.classes == ("a", "b")
        assert images.labels is not None
        assert images.labels.tolist() == [0, 0, 1, 1]

    def test_without_asking_there_are_no_labels(self, tmp_path: Path) -> None:
        images = load_images(str(folder(tmp_path, pixels(1), ["a/x.png"])))
        assert images.labels is None
        assert images.classes == ()

    def test_a_file_outside_class_folders_has_no_label(self, tmp_path: Path) -> None:
        folder(tmp_path, pixels(2), ["a/x.png", "loose.png"])
        with pytest.raises(ImageError, match=r"loose\.png lies in no class folder"):
            load_images(str(tmp_path), labels=True)

    def test_a_link_to_a_folder_above_ends(self, tmp_path: Path) -> None:
        folder(tmp_path, pixels(1), ["a/x.png"])
        (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
        assert len(load_images(str(tmp_path))) == 1

    def test_different_sizes_need_a_size(self, tmp_path: Path) -> None:
        picture(pixels(1, 6, 5)[0]).save(tmp_path / "a.png")
        picture(pixels(1, 8, 4)[0]).save(tmp_path / "b.png")
        with pytest.raises(ImageError, match=r"a\.png is 6x5, .*b\.png is 8x4 .*--image-size"):
            load_images(str(tmp_path))
        images = load_images(str(tmp_path), size=4)
        assert everything(images).shape == (2, 3, 4, 4)
        assert images.shape == (4, 4)

    def test_size_resizes_the_shorter_side_and_cuts_the_centre(self, tmp_path: Path) -> None:
        stripes = torch.zeros(3, 8, 24, dtype=torch.uint8)
        stripes[:, :, 8:16] = 200
        picture(stripes).save(tmp_path / "a.png")
        assert bool((everything(load_images(str(tmp_path), size=8)) == 200).all())
        assert int(everything(load_images(str(tmp_path), size=4))[0, 0, 2, 2]) == 200
        assert everything(load_images(str(tmp_path), size=16)).shape == (1, 3, 16, 16)

    def test_large_folders_read_headers_only_at_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(images, "FULL_CHECK_LIMIT", 1)
        whole = encode(pixels(1, 64, 64)[0])
        (tmp_path / "a.png").write_bytes(whole)
        (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
        found = load_images(str(tmp_path))
        assert found.shape == (64, 64)
        assert found.take([0]).shape == (1, 3, 64, 64)
        with pytest.raises(ImageError, match=r"b\.png cannot be read as a picture \(.*truncated"):
            found.take([1])

    def test_digest_follows_names_and_bytes(self, tmp_path: Path) -> None:
        one = load_images(str(folder(tmp_path / "one", pixels(2), ["a.png", "b.png"])))
        same = load_images(str(folder(tmp_path / "two", pixels(2), ["a.png", "b.png"])))
        renamed = load_images(str(folder(tmp_path / "three", pixels(2), ["a.png", "c.png"])))
        other = load_images(str(folder(tmp_path / "four", pixels(2, seed=1), ["a.png", "b.png"])))
        assert one.digest == same.digest
        assert len({one.digest, renamed.digest, other.digest}) == 3

    @pytest.mark.parametrize("budget", [0, 10**9])
    def test_pixels_do_not_depend_on_the_memory_budget(
        self, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(image_view, "MEMORY_BUDGET", budget)
        found = load_images(str(folder(tmp_path, pixels(3), ["a.png", "b.png", "c.png"])))
        part = found.subset([2, 2, 0])
        for _ in range(2):
            assert torch.equal(part.take([1, 2]), pixels(3)[[2, 0]])
        assert torch.equal(everything(found), pixels(3))
        assert torch.equal(everything(found.subset([1])), pixels(3)[[1]])

    def test_kept_pixels_survive_the_file(self, tmp_path: Path) -> None:
        found = load_images(str(folder(tmp_path, pixels(2), ["a.png", "b.png"])))
        found.take([0])
        shutil.rmtree(tmp_path)
        assert torch.equal(found.take([0]), pixels(2)[[0]])
        with pytest.raises(ImageError, match=r"b\.png cannot be read as a picture \(the file is gone\)"):
            found.take([1])

    def test_a_picture_that_changes_size_is_named(self, tmp_path: Path) -> None:
        found = load_images(str(folder(tmp_path, pixels(1), ["a.png"])))
        picture(pixels(1, 9, 9)[0]).save(tmp_path / "a.png")
        with pytest.raises(ImageError, match=r"a\.png is now 9x9, the set was opened with 6x5"):
            found.take([0])


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("L", 90, (90, 90, 90)),
            ("1", 1, (255, 255, 255)),
            ("RGB", (10, 20, 30), (10, 20, 30)),
            ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
            ("LA", (90, 5), (90, 90, 90)),
            ("I;16", 0x8040, (0x80, 0x80, 0x80)),
        ],
    )
    def test_png_modes_become_rgb(
        self, mode: str, value: Any, expected: tuple[int, ...], tmp_path: Path
    ) -> None:
        Image.new(mode, (3, 2), value).save(tmp_path / "a.png")
        assert everything(load_images(str(tmp_path)))[0, :, 1, 2].tolist() == list(expected)

    def test_palette_with_transparency_becomes_rgb(self, tmp_path: Path) -> None:
        source = Image.new("P", (3, 2), 1)
        source.putpalette([0, 0, 0, 10, 20, 30])
        source.save(tmp_path / "a.png", transparency=b"\x00\x80")
        assert everything(load_images(str(tmp_path)))[0, :, 0, 0].tolist() == [10, 20, 30]

    def test_cmyk_jpeg_becomes_rgb(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        red, green, blue = everything(load_images(str(tmp_path)))[0, :, 4, 4].tolist()
        assert red > 240
        assert max(green, blue) < 15

    @pytest.mark.parametrize(("mode", "value", "reason"), [("F", 0.5, "floating"), ("I", 70_000, "32 bits")])
    def test_wide_pixels_are_refused(self, mode: str, value: float, reason: str, tmp_path: Path) -> None:
        Image.new(mode, (3, 2), value).save(tmp_path / "a.tif")
        with pytest.raises(ImageError, match=rf"a\.tif cannot be read as a picture \(.*{reason}"):
            load_images(str(tmp_path))

    def test_a_picture_that_starts_a_program_is_no_picture(self, tmp_path: Path) -> None:
        picture(pixels(1)[0]).save(tmp_path / "a.eps")
        (tmp_path / "a.eps").rename(tmp_path / "a.png")
        with pytest.raises(ImageError, match="not a known picture format"):
            load_images(str(tmp_path))


class TestBroken:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_truncated_file_is_named(self, kind: str, tmp_path: Path) -> None:
        whole = encode(pixels(1, 64, 64)[0], kind)
        (tmp_path / f"a.{kind}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ImageError, match=rf"a\.{kind} cannot be read .* --skip-unreadable\.$"):
            load_images(str(tmp_path))

    @pytest.mark.parametrize("content", [b"", b"some text"])
    def test_non_image_with_image_suffix_is_named(self, content: bytes, tmp_path: Path) -> None:
        folder(tmp_path, pixels(1), ["a.png"])
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"b\.png cannot be read as a picture"):
            load_images(str(tmp_path), size=4)

    @pytest.mark.parametrize("limit", [0, 10])
    def test_skip_unreadable_lists_what_it_drops(
        self, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(images, "FULL_CHECK_LIMIT", limit)
        folder(tmp_path, pixels(3), ["x/a.png", "y/b.png", "y/c.png"])
        whole = (tmp_path / "y" / "b.png").read_bytes()
        (tmp_path / "y" / "b.png").write_bytes(whole[: len(whole) // 2])
        found = load_images(str(tmp_path), labels=True, skip_unreadable=True)
        assert found.skipped == (str(tmp_path / "y" / "b.png"),)
        assert torch.equal(everything(found), pixels(3)[[0, 2]])
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1]

    def test_nothing_readable_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"text")
        with pytest.raises(ImageError, match="none of its 1 pictures can be read"):
            load_images(str(tmp_path), skip_unreadable=True)

    def test_unreadable_parquet_row_is_named(self, tmp_path: Path) -> None:
        path = shard(tmp_path / "a.parquet", pixels(6))
        table = pq.read_table(path)
        rows = table["image"].to_pylist()
        rows[5]["bytes"] = b"text"
        rows[2]["bytes"] = None
        pq.write_table(
            table.set_column(0, "image", pa.array(rows, table["image"].type)), path, row_group_size=4
        )
        with pytest.raises(ImageError, match=r"row 2 of .*a\.parquet cannot be read .*no picture bytes"):
            load_images(str(path))
        found = load_images(str(path), skip_unreadable=True)
        assert [name.split(" of ")[0] for name in found.skipped] == ["row 2", "row 5"]
        assert torch.equal(everything(found), pixels(6)[[0, 1, 3, 4]])

    @pytest.mark.parametrize("name", ["missing", "missing.npz", "some/where:train", "", "cifar11:train"])
    def test_missing_path_says_what_is_accepted(self, name: str) -> None:
        with pytest.raises(ImageError, match=r"No pictures at .* expected a folder, an \.npz"):
            load_images(name)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="holds no pictures"):
            load_images(str(tmp_path))

    def test_unlistable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: bytes) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(
            ImageError, match=r"cannot be listed \(.*Permission denied\); check its permissions"
        ):
            load_images(str(tmp_path))

    def test_other_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ImageError, match=r"a\.txt is neither a folder nor an \.npz or \.parquet file"):
            load_images(str(tmp_path / "a.txt"))

    def test_size_zero(self) -> None:
        with pytest.raises(ImageError, match="image size of at least 2 pixels, found 0"):
            load_images("digits", size=0)


class TestNpz:
    @settings(max_examples=20, deadline=None)
    @given(
        count=st.integers(1, 5),
        height=st.integers(1, 7),
        width=st.integers(1, 7),
        field=st.booleans(),
        compressed=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_round_trip_and_digest(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        count: int,
        height: int,
        width: int,
        field: bool,
        compressed: bool,
        seed: int,
    ) -> None:
        values, labels = pixels(count, height, width, seed), np.arange(count)
        path = tmp_path_factory.mktemp("npz") / "set.npz"
        keys = ("x", "y") if field else ("images", "labels")
        save = np.savez_compressed if compressed else np.savez
        held = {keys[0]: values.permute(0, 2, 3, 1).numpy(), keys[1]: labels[:, None] if field else labels}
        save(path, allow_pickle=False, **held)
        found = load_images(str(path), labels=True)
        assert torch.equal(everything(found), values)
        assert found.labels is not None
        assert found.labels.tolist() == labels.tolist()
        assert found.digest == ImageSet.from_arrays(values, labels).digest
        assert load_images(str(path)).digest == ImageSet.from_arrays(values).digest

    def test_above_the_budget_it_is_memory_mapped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        np.savez(tmp_path / "a.npz", x=pixels(3).permute(0, 2, 3, 1).numpy())
        monkeypatch.setattr(image_sources, "MEMORY_BUDGET", 0)
        held = image_sources._map_stored(tmp_path / "a.npz", "x")
        assert isinstance(held, np.memmap)
        assert torch.equal(everything(load_images(str(tmp_path / "a.npz"))), pixels(3))

    @pytest.mark.parametrize(
        ("held", "message"),
        [
            ({"x": np.zeros((2, 4, 4, 3))}, r"found \(2, 4, 4, 3\) and float64"),
            ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"found \(2, 3, 4, 4\) and uint8"),
            ({"t": np.zeros(2), "tm": np.zeros(2)}, "holds t, tm; expected an array `images` or `x`"),
            ({"x": np.zeros((0, 4, 4, 3), np.uint8)}, "it is empty"),
        ],
    )
    def test_wrong_content_is_named(self, held: dict[str, Any], message: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", allow_pickle=False, **held)
        with pytest.raises(ImageError, match=message):
            load_images(str(tmp_path / "a.npz"))

    @pytest.mark.parametrize("budget", [0, 10**9])
    def test_pickles_are_refused(self, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_sources, "MEMORY_BUDGET", budget)
        np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], object))
        with pytest.raises(ImageError, match="files with pickled objects are refused"):
            load_images(str(tmp_path / "a.npz"))

    def test_broken_archive(self, tmp_path: Path) -> None:
        (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(ImageError, match=r"a\.npz cannot be read as plain arrays"):
            load_images(str(tmp_path / "a.npz"))

    def test_labels_that_are_not_there(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4, 3), np.uint8))
        with pytest.raises(ImageError, match="holds no labels"):
            load_images(str(tmp_path / "a.npz"), labels=True)

    def test_the_size_it_already_has_changes_nothing(self, tmp_path: Path) -> None:
        values = pixels(2, 4, 4)
        np.savez(tmp_path / "a.npz", x=values.permute(0, 2, 3, 1).numpy())
        assert torch.equal(everything(load_images(str(tmp_path / "a.npz"), size=4)), values)


class TestParquet:
    def test_random_order_over_files_and_row_groups(self, tmp_path: Path) -> None:
        values = pixels(11)
        shard(tmp_path / "train-00000-of-00002.parquet", values[:6], [0, 1] * 3)
        shard(tmp_path / "train-00001-of-00002.parquet", values[6:], [1, 1, 0, 0, 1], group=3)
        found = load_images(str(tmp_path), labels=True)
        assert found.name == f"{tmp_path.name}:train"
        assert found.classes == ("cat", "dog")
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1] * 3 + [1, 1, 0, 0, 1]
        assert torch.equal(found.take([10, 0, 6, 3, 10]), values[[10, 0, 6, 3, 10]])
        part = found.subset([9, 2, 5])
        assert torch.equal(everything(part), values[[9, 2, 5]])
        assert torch.equal(everything(found), values)

    def test_digest_does_not_depend_on_the_cut_into_files(self, tmp_path: Path) -> None:
        values = pixels(5)
        shard(tmp_path / "two" / "train-0.parquet", values[:2], [0, 1], group=1)
        shard(tmp_path / "two" / "train-1.parquet", values[2:], [1, 0, 0])
        one = load_images(str(shard(tmp_path / "one.parquet", values, [0, 1, 1, 0, 0])), labels=True)
        assert load_images(str(tmp_path / "two"), labels=True).digest == one.digest
        assert one.subset([4, 1]).digest != one.subset([1, 4]).digest

    @pytest.mark.parametrize("mark", [":", "#"])
    def test_split_is_chosen_by_name(self, mark: str, tmp_path: Path) -> None:
        shard(tmp_path / "train-00000-of-00001.parquet", pixels(3))
        shard(tmp_path / "test.parquet", pixels(2, seed=1))
        assert torch.equal(everything(load_images(f"{tmp_path}{mark}test")), pixels(2, seed=1))
        assert len(load_images(f"{tmp_path}{mark}train")) == 3
        with pytest.raises(ImageError, match=r"several splits; choose one of .*:test, .*:train"):
            load_images(str(tmp_path))
        with pytest.raises(ImageError, match=r"no split 'val'; choose one of .*:test, .*:train"):
            load_images(f"{tmp_path}{mark}val")

    def test_split_of_a_picture_folder_is_refused(self, tmp_path: Path) -> None:
        folder(tmp_path, pixels(1), ["train/a.png"])
        with pytest.raises(ImageError, match="has no split 'train': only a folder of parquet files"):
            load_images(f"{tmp_path}:train")

    def test_wrong_columns_are_named(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"pixels": [b"a"], "label": [1]}), tmp_path / "a.parquet")
        with pytest.raises(
            ImageError, match=r"expected a column `image` .* found pixels: binary, label: int64"
        ):
            load_images(str(tmp_path / "a.parquet"))

    def test_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
        with pytest.raises(ImageError, match="cannot be read as parquet"):
            load_images(str(tmp_path / "a.parquet"))

    @pytest.mark.parametrize(
        ("spec", "count", "classes", "shape"),
        [
            ("cifar10:test", 10_000, 10, (32, 32)),
            ("gtsrb:test", 5_000, 43, (32, 32)),
            ("tiny-imagenet:val", 1_000, 20, (64, 64)),
        ],
    )
    def test_real_packs(self, spec: str, count: int, classes: int, shape: tuple[int, int]) -> None:
        if not (DATA / spec.split(":")[0]).is_dir():
            pytest.skip(f"the data pack {spec} is not in {DATA}")
        found = load_images(f"{DATA}/{spec}", labels=True)
        assert (len(found), len(found.classes), found.shape) == (count, classes, shape)
        drawn = found.sample(50, Rng(0))
        assert everything(drawn).shape == (50, 3, *shape)
        assert 40 < float(everything(drawn).float().mean()) < 200
        assert drawn.digest == found.sample(50, Rng(0)).digest

    def test_real_reference_file(self) -> None:
        path = DATA / "badencoder" / "reference__cifar10__one.npz"
        if not path.is_file():
            pytest.skip(f"the reference file is not in {DATA}")
        found = load_images(str(path), labels=True)
        assert (len(found), found.shape) == (1, (32, 32))


class TestNames:
    def test_digits_split_is_fixed_and_stratified(self) -> None:
        train, test = load_images("digits:train", labels=True), load_images("digits:test", labels=True)
        assert (len(train), len(test), train.shape) == (1200, 597, (32, 32))
        assert train.labels is not None
        assert test.labels is not None
        share = train.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
        assert share.tolist() == pytest.approx([1200 / 1797] * 10, abs=0.01)
        assert load_images("digits").digest == load_images("digits:train").digest
        assert test.classes == tuple("0123456789")

    def test_digits_are_the_scaled_originals(self) -> None:
        from sklearn.datasets import load_digits

        taken = everything(load_images("digits:train")).float()
        assert torch.equal(taken[:, 0], taken[:, 2])
        whole = torch.cat([taken, everything(load_images("digits:test")).float()])[:, 0]
        assert float(whole.mean() / 255 * 16) == pytest.approx(float(load_digits().images.mean()), rel=0.01)

    def test_unknown_split_of_a_name(self) -> None:
        with pytest.raises(ImageError, match="digits has no split 'val'"):
            load_images("digits:val")
        with pytest.raises(ImageError, match="choose one of stl10:train, stl10:test, stl10:unlabeled"):
            load_images("stl10")

    def test_a_path_wins_only_where_it_looks_like_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder(tmp_path / "digits", pixels(2), ["a.png", "b.png"])
        folder(tmp_path / "photos", pixels(3), ["a.png", "b.png", "c.png"])
        assert len(load_images("digits")) == 1200
        assert len(load_images("./digits")) == 2
        assert len(load_images("photos")) == 3

    @pytest.mark.parametrize("download", [False, True])
    def test_absent_torchvision_set(
        self, download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(root: str, **options: object) -> None:
            raise RuntimeError("Dataset not found. More advice.")

        monkeypatch.setattr(torchvision.datasets, "SVHN", absent)
        advice = "check the network" if download else "add --download"
        with pytest.raises(ImageError, match=rf"svhn:test was not found under --data-root .*{advice}"):
            load_images("svhn:test", data_root=tmp_path, download=download)

    @pytest.mark.parametrize(
        ("spec", "options"),
        [
            ("cifar10:test", {"train": False}),
            ("cifar100:train", {"train": True}),
            ("svhn:train", {"split": "train"}),
            ("stl10:unlabeled", {"split": "unlabeled"}),
        ],
    )
    def test_torchvision_arrays(
        self, spec: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values, calls = pixels(2), []
        cifar = spec.startswith("cifar")

        class Held:
            classes = ("cat", "dog")
            data = (values.permute(0, 2, 3, 1) if cifar else values).numpy()
            targets = (1, 0)
            labels = np.array([1, 0] if "unlabeled" not in spec else [-1, -1])

            def __init__(self, root: str, **options: object) -> None:
                calls.append((root, options))

        monkeypatch.setattr(torchvision.datasets, spec.split(":")[0].upper(), Held)
        found = load_images(spec, data_root=tmp_path, download=True)
        assert calls == [(str(tmp_path), {"download": True, **options})]
        assert torch.equal(everything(found), values)
        assert found.labels is None
        if "unlabeled" in spec:
            with pytest.raises(ImageError, match="marks an unlabelled image"):
                load_images(spec, data_root=tmp_path, labels=True)
        else:
            labelled = load_images(spec, data_root=tmp_path, labels=True)
            assert labelled.labels is not None
            assert labelled.labels.tolist() == [1, 0]
            assert labelled.name == spec

    def test_real_torchvision_reader_of_gtsrb(self, tmp_path: Path) -> None:
        training = tmp_path / "gtsrb" / "GTSRB" / "Training"
        for label, image in enumerate(pixels(2, 8, 8)):
            (training / f"{label:05d}").mkdir(parents=True)
            picture(image).save(training / f"{label:05d}" / "a.ppm")
        found = load_images("gtsrb:train", data_root=tmp_path, labels=True)
        assert torch.equal(everything(found), pixels(2, 8, 8))
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1]
