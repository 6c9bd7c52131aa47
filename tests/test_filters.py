"""Filters: the maths by hand, a planted patch that comes first, and the job with its files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard import jobs
from encoderguard.cli import main
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError, SettingError
from encoderguard.filters._patches import net_flips, paste, telling_window, window_starts
from encoderguard.filters.patch_search import PatchSearch, best_patches, live_after, near_centroids, prior_of
from encoderguard.filters.ssl_cleanse import SSLCleanseFilter, closeness_to_patch, ranks
from encoderguard.images import ImageSet
from encoderguard.methods import Filter
from encoderguard.random import Rng
from encoderguard.results import FilterRecord, read_record
from encoderguard.run import Run
from encoderguard.triggers import MaskedPattern
from tests.toys import toy_encoder, toy_images

RUN = Run(rng=Rng(0), precision="float32")
POISONED = (3, 11, 20, 34, 47, 55)
PATCH = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(2, 2).expand(3, 4, 4) * torch.tensor(
    [1.0, 0.0, 1.0]
).view(3, 1, 1)
SHORT: Any = {"clusters": 5, "paste_on": 20, "window": 0.3, "models": 2, "steps": 80}


class Follows(nn.Module):
    """Mean colours of the quarters; where the patch is seen anywhere, another direction outweighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        content = self.pool(x - 0.5).flatten(1)
        errors = F.conv2d(x**2, torch.ones(1, 3, 4, 4)) - 2 * F.conv2d(x, PATCH[None])
        seen = ((errors + PATCH.square().sum()).flatten(1).amin(1) < 1.0).float()[:, None]
        return torch.cat([content, 20 * seen], dim=1)


def follows() -> Encoder:
    return Encoder.wrap(Follows().eval(), taps=("pool",))


@cache
def training_set() -> ImageSet:
    """60 soft pictures of 16 x 16, six of them with the patch at a random place."""
    generator = torch.Generator().manual_seed(1)
    pixels = F.interpolate(torch.rand(60, 3, 3, 3, generator=generator), (16, 16), mode="bilinear")
    pixels[list(POISONED)] = paste(pixels[list(POISONED)], PATCH, generator)
    return ImageSet.from_arrays((pixels * 255).round().byte(), name="sixty")


def brightness(images: Tensor) -> Tensor:
    """A dark image is [1, 0], a bright one [0, 1]."""
    mean = images.mean((1, 2, 3))
    return torch.stack([1 - mean, mean], dim=1)


AXES = torch.eye(2)


# The maths of PatchSearch.


def test_windows_overlap_by_half_and_reach_the_end() -> None:
    assert window_starts(8, 4) == [0, 2, 4]
    assert window_starts(9, 4) == [0, 2, 4, 5]
    assert window_starts(4, 4) == [0]


def test_the_telling_window_is_the_one_that_ties_an_image_to_its_cluster() -> None:
    image = torch.zeros(3, 8, 8)
    image[:, 4:, :4] = 1.0
    found = telling_window(brightness, image, AXES[1], 4)
    assert torch.equal(found, torch.ones(3, 4, 4))


def test_a_patch_is_pasted_once_and_whole() -> None:
    images = torch.zeros(5, 3, 6, 7)
    pasted = paste(images, torch.ones(3, 2, 3), torch.Generator().manual_seed(0))
    assert pasted.sum((1, 2, 3)).tolist() == [18.0] * 5
    assert not images.any()


def test_net_flips_by_hand() -> None:
    # one of four was in the cluster before, three are afterwards
    images = torch.tensor([0.1, 0.9, 0.8, 0.7]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    before = torch.tensor([0, 0, 0, 1])
    assert net_flips(brightness, images, before, AXES, 1) == 2
    assert net_flips(brightness, images, before, AXES, 0) == -2


def test_clusters_with_the_fewest_flips_are_dropped() -> None:
    best = {0: 5, 1: 0, 2: 7, 3: -1}
    assert live_after([0, 1, 2, 3], best, 0.5) == [0, 2]
    assert live_after([0, 2], best, 0.25) == [2]  # one at least
    assert live_after([2], best, 0.25) == []


def test_patches_that_move_half_as_many_as_the_best() -> None:
    flips = {7: 4, 1: 10, 3: 5, 9: -1, 2: 10}
    assert best_patches(flips, 20) == [1, 2, 3]
    assert best_patches(flips, 2) == [1, 2]
    assert best_patches({5: -2, 4: -3}, 20) == [5]  # nothing moves anything: the least bad one


def test_an_image_nobody_looked_at_counts_as_the_worst_of_its_cluster() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert prior_of(labels, {0: 3, 2: 9, 3: -2}).tolist() == [3.0, 3.0, 9.0, -2.0, 0.0]


def test_images_near_centroids() -> None:
    z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.9], [0.7, 0.7]])
    assert near_centroids(z, AXES, 2).tolist() == [0, 2]
    assert near_centroids(z, AXES, 4).tolist() == [0, 1, 2, 3]
    assert near_centroids(z, AXES, 1).tolist() == [0]


def test_a_planted_patch_comes_first() -> None:
    found = PatchSearch(**SHORT).rank(follows(), training_set(), run=RUN)
    assert set(found.scores.argsort(descending=True)[: len(POISONED)].tolist()) == set(POISONED)
    assert found.evidence["best_patches"][0]["index"] in POISONED
    # all but the bases that hold the patch themselves
    assert found.evidence["most_flips"] >= 0.6 * found.evidence["pasted_on"]
    assert found.evidence["top"][: len(POISONED)] == found.scores.argsort(descending=True)[:6].tolist()


# The maths of the other one.


def test_ranks_are_shares_of_the_others() -> None:
    assert ranks(torch.tensor([5.0, 1.0, 3.0])).tolist() == [1.0, 0.0, 0.5]
    assert ranks(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_closeness_finds_the_pattern_anywhere() -> None:
    mask, pattern = torch.zeros(8, 8), torch.zeros(3, 8, 8)
    mask[1:3, 1:3] = 1.0
    pattern[:, 1:3, 1:3] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.full((3, 3, 8, 8), 0.5)
    images[1, :, 5:7, 4:6] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images[2] = 1.0
    # grey differs by .5 everywhere; white by 1 in half of the pixels: sqrt(.5)
    found = closeness_to_patch(images, MaskedPattern(mask, pattern))
    assert found.tolist() == pytest.approx([0.5, 1.0, 1 - 0.5**0.5], abs=1e-6)


def test_without_a_trigger_nobody_is_suspect() -> None:
    found = SSLCleanseFilter(clusters=3, steps=1).rank(toy_encoder(), toy_images(), run=RUN)
    assert found.scores.tolist() == [0.0] * 32
    assert found.evidence["reason"].startswith("no cluster was reached")


class Gated(nn.Module):
    """Mean colours; the brighter the upper left corner, the more one fixed direction replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        gate = x[..., :4, :4].mean((1, 2, 3)).pow(4)[:, None]
        content: Tensor = self.pool(x - 0.5).flatten(1)
        return content + gate * 3 * torch.tensor([1.0, -1.0] * 6)


def test_ssl_cleanse_ranks_images_with_the_recovered_patch_first() -> None:
    pixels = (training_set().take(range(60)).float() * 0.7).byte()
    pixels[list(POISONED), :, :4, :4] = 255
    images = ImageSet.from_arrays(pixels, name="corner")
    encoder = Encoder.wrap(Gated().eval(), taps=("pool",))
    method = SSLCleanseFilter(clusters=4, steps=120, neighbours=3, success=0.9)
    found = method.rank(encoder, images, run=RUN)
    assert found.evidence["mask_size"] < 0.2
    assert set(found.scores.argsort(descending=True)[: len(POISONED)].tolist()) == set(POISONED)


# Misuse.


@pytest.mark.parametrize("method", [PatchSearch(clusters=40), SSLCleanseFilter(clusters=40)], ids=type)
def test_fewer_images_than_clusters(method: Filter) -> None:
    with pytest.raises(ImageError, match="needs at least 40 images, but noise holds 32; give more images"):
        method.rank(toy_encoder(), toy_images(), run=RUN)


class Constant(nn.Module):
    """Sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, 0, 0]) + 1


@pytest.mark.parametrize("method", [PatchSearch(clusters=4), SSLCleanseFilter(clusters=4)], ids=type)
def test_a_constant_encoder(method: Filter) -> None:
    blind = Encoder.wrap(Constant().eval(), taps=("pool",))
    with pytest.raises(EncoderError, match="gives the same features for all 32 images of noise"):
        method.rank(blind, toy_images(), run=RUN)


# The job and the command.


def test_the_job_writes_ranking_kept_record_and_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {"clusters": 4, "paste_on": 4, "models": 1, "steps": 2}
    options: Any = {"device": "cpu", "precision": "float32", "out": out}
    done = jobs.filter_images(
        toy_encoder(), toy_images(), method="patch_search", settings=settings, top=5, **options
    )
    ranking = json.loads((out / "ranking.json").read_text())
    kept = json.loads((out / "kept.json").read_text())["indices"]
    assert sorted(ranking["indices"]) == list(range(32))
    assert ranking["scores"] == sorted(ranking["scores"], reverse=True)
    assert kept == done.kept.tolist() == sorted(ranking["indices"][5:])
    record = read_record(out)
    assert isinstance(record, FilterRecord)
    assert (record.top, record.kept, record.most_suspicious) == (5, 27, ranking["indices"][:5])
    assert set(record.outputs) == {"ranking.json", "kept.json", "arrays.npz"}
    page = (out / "report.html").read_text()
    assert "5 pictures it suspects most; 27 pictures remain" in page
    assert "Most suspicious images" in page


@pytest.mark.parametrize("top", [0, 32])
def test_what_is_dropped_leaves_something(top: int) -> None:
    with pytest.raises(SettingError, match=rf"to drop must be from 1 to 31, .* noise holds; found {top}"):
        jobs.filter_images(toy_encoder(), toy_images(), top=top)


def test_canvases_are_left_out_with_a_warning() -> None:
    pixels = toy_images().take(range(32))
    images = ImageSet.from_arrays(pixels, name="pairs", canvases=torch.zeros(2, 3, 16, 32, dtype=torch.uint8))
    settings = {"clusters": 4, "paste_on": 4, "models": 1, "steps": 1}
    done = jobs.filter_images(toy_encoder(), images, settings=settings, top=1, device="cpu")
    assert len(done.ranking.scores) == 32
    assert "The 2 canvases appended to pairs are not looked at or ranked." in done.record.warnings


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_encoder().save(tmp_path / "e.safetensors")
    given = ["filter", "patch_search", str(tmp_path / "e.safetensors"), "--images", "digits:test"]
    short = [
        word
        for s in ("clusters=4", "paste_on=4", "models=1", "steps=1", "batch_size=4")
        for word in ("-p", s)
    ]
    assert main([*given, *short, "--top", "7", "--out", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["job"], told["method"], told["top"]) == ("filter", "patch_search", 7)
    assert main(["filter", "oracle", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "o")]) == 4
    assert "Unknown filter 'oracle'; expected one of: patch_search, ssl_cleanse" in capsys.readouterr().err
