"""ABS and SSL-Cleanse on an encoder: indices, elbows and shares by hand, planted patches, misuse."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from encoderguard.cluster_search import share_moved
from encoderguard.clusters import (
    elbow,
    elbow_of_features,
    nearest_centroids,
    neighbour_votes,
    outlier_indices,
    require_spread,
)
from encoderguard.detectors._neurons import (
    COLLAPSE,
    Goal,
    invert_neurons,
    keep_largest,
    set_channels,
    stimulate,
)
from encoderguard.detectors.abs import ABS, judge_share, wilson
from encoderguard.detectors.ssl_cleanse import SSLCleanse, cluster_indices
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError, SettingError
from encoderguard.hidden import Units, last_stage_units
from encoderguard.images import ImageSet
from encoderguard.methods import Detector
from encoderguard.random import Rng
from encoderguard.run import Run
from tests.toys import toy_encoder, toy_images

RUN = Run(rng=Rng(0), precision="float32")
FIRST = Units(producer="block.0", norm=None, consumer="block.2", count=3, channels_first=True)


# Clusters.


def test_the_outlier_index_by_hand() -> None:
    # median 5; deviations 4 1 0 1 2, whose median is 1: index (5 - 1) / 1.4826, not divided by .6745 as well
    found = outlier_indices(torch.tensor([1.0, 4.0, 5.0, 6.0, 7.0]))
    assert found.tolist() == pytest.approx([4 / 1.4826, 1 / 1.4826, 0, -1 / 1.4826, -2 / 1.4826])


def test_a_large_mask_is_no_outlier() -> None:
    assert outlier_indices(torch.tensor([4.0, 5.0, 5.5, 6.0, 60.0])).argmax() == 0


def test_equal_sizes_have_index_0() -> None:
    assert outlier_indices(torch.full((4,), 0.3)).tolist() == [0.0] * 4


def test_the_elbow_by_hand() -> None:
    # scaled: 1, .4, .1, .05, 0 against the line 1, .75, .5, .25, 0: farthest below at the third
    assert elbow(torch.tensor([20.0, 8.0, 2.0, 1.0, 0.0])) == 2
    assert elbow(torch.tensor([3.0, 2.0, 1.0])) == 0
    assert elbow(torch.tensor([1.0, 1.0, 1.0])) == 0
    assert elbow(torch.tensor([1.0])) == 0


def test_the_elbow_of_obvious_blobs() -> None:
    centres = torch.eye(5).repeat_interleave(20, 0)
    features = centres + 0.02 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    count, costs = elbow_of_features(features, 2, 10, Rng(0))
    assert count == 5
    assert len(costs) == 9
    assert elbow_of_features(features[::10], 2, 10, Rng(0))[0] == 2  # a quarter of 10 images


def test_votes_of_the_nearest() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([2, 0, 0, 1, 1])
    queries = torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    assert neighbour_votes(queries, bank, labels, 1).tolist() == [2, 1]
    assert neighbour_votes(queries, bank, labels, 3).tolist() == [0, 1]
    assert neighbour_votes(queries, bank, labels, 99).tolist() == [0, 0]  # two against two against one
    assert nearest_centroids(queries, torch.tensor([[0.0, 1.0], [2.0, 0.1]])).tolist() == [1, 0]


def test_the_share_moved_by_hand() -> None:
    # images 2 and 3 are in cluster 1 already; of the other four, three were moved there
    own, votes = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 1, 0, 1, 2])
    assert share_moved(votes, own, 1) == 0.75
    assert share_moved(votes, own, 0) == 0.25
    assert share_moved(votes, torch.ones(6, dtype=torch.int64), 1) == 1.0


def test_features_must_differ() -> None:
    require_spread(torch.eye(3), "three")
    with pytest.raises(EncoderError, match="the same features for all 3 images of three, so they have no"):
        require_spread(torch.ones(3, 2), "three")


# ABS.


class Block(nn.Module):
    """Two 1 x 1 convolutions with a shortcut around them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
        self.pool = nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            self.block[0].weight.copy_(torch.eye(3)[..., None, None])  # type: ignore[operator]
            # channel 2 is loud: it drives the first output ten times as hard
            loud = torch.diag(torch.tensor([0.1, 0.1, 0.0]))
            loud[0, 2] = 10.0
            self.block[2].weight.copy_(loud[..., None, None])  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.pool(x + self.block(x)).flatten(1)
        return found


def block() -> Encoder:
    return Encoder.wrap(Block().eval(), taps=("block",))


def dull(count: int = 12) -> ImageSet:
    """Pictures without much of the third colour."""
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    pixels[:, 2] //= 50
    return ImageSet.from_arrays(pixels.byte(), name="dull")


def test_one_channel_of_each_copy_is_set() -> None:
    channels = torch.arange(12.0).view(1, 3, 2, 2)
    found = set_channels(channels, FIRST, torch.tensor([2, 0]), torch.tensor([7.0, -1.0]))
    assert found.shape == (2, 3, 2, 2)
    assert found[0, 2].flatten().tolist() == [7.0] * 4
    assert found[1, 0].flatten().tolist() == [-1.0] * 4
    assert torch.equal(found[0, :2], channels[0, :2])
    assert torch.equal(channels, torch.arange(12.0).view(1, 3, 2, 2))
    tokens = Units(producer="a", norm=None, consumer="b", count=3, channels_first=False)
    rows = set_channels(torch.zeros(1, 4, 3), tokens, torch.tensor([1]), torch.tensor([5.0]))
    assert rows[0].sum(0).tolist() == [0.0, 20.0, 0.0]


def test_stimulation_agrees_with_setting_the_channel_for_all_images_at_once() -> None:
    from encoderguard.hidden import edited
    from encoderguard.pruning import channel_activations
    from encoderguard.similarity import mean_pairwise_cosine, standardise

    encoder, images = toy_encoder(), toy_images(6)
    layer = last_stage_units(encoder)[0]
    found = stimulate(encoder, layer, images, (3.0,), COLLAPSE, run=RUN)
    pixels = images.take(range(6)).float() / 255
    value = 3 * channel_activations(encoder, layer, images, RUN, reduction="max")[1]

    def raise_one(channels: Tensor) -> Tensor:
        changed = channels.clone()
        changed[:, 1] = value
        return changed

    with torch.no_grad():
        clean = encoder(pixels)
        with edited(encoder, layer, raise_one):
            raised = encoder(pixels)
    before, after = (mean_pairwise_cosine(standardise(z, clean)) for z in (clean, raised))
    assert found[1].rise == pytest.approx(float(after - before), abs=1e-4)
    assert [neuron.channel for neuron in found] == list(range(layer.count))


def test_the_loud_channel_is_found_and_inverted() -> None:
    encoder = block()
    found = stimulate(encoder, FIRST, dull(), (1.0, 8.0), COLLAPSE, run=RUN)
    best = max(found, key=lambda neuron: neuron.rise)
    assert (best.channel, best.level) == (2, 8.0)
    settings: Any = {"area": 0.25, "steps": 60, "batch_size": 8, "learning_rate": 0.2}
    trigger = invert_neurons(encoder, dull(), [best], COLLAPSE, run=RUN, **settings)[0]
    covered = trigger.mask > 0.5
    assert 1 <= int(covered.sum()) <= 4
    assert trigger.pattern[2][covered].mean() > 0.8  # it is the third colour that excites the channel


WEIGHT = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
"""A downstream classifier: answer 1 hangs on the first feature, which the loud channel drives."""


def probability(features: Tensor, clean: Tensor) -> Tensor:
    return (features @ WEIGHT.T).softmax(-1).mean(-2)


def test_stimulation_of_a_classifier_by_hand() -> None:
    encoder, images = block(), dull(5)
    found = stimulate(encoder, FIRST, images, (1.0, 8.0), Goal(probability), run=RUN)
    best = max(found, key=lambda neuron: neuron.rise)
    assert (best.channel, best.answer, best.level) == (2, 1, 8.0)
    pixels = images.take(range(5)).float() / 255
    with torch.no_grad():
        clean = encoder(pixels)
        raised = clean.clone()
        raised[:, 0] += 10 * (8 * best.largest - pixels[:, 2].mean((1, 2)))
    rise = (raised @ WEIGHT.T).softmax(1).mean(0)[1] - (clean @ WEIGHT.T).softmax(1).mean(0)[1]
    assert best.rise == pytest.approx(float(rise), abs=1e-4)


def test_a_search_raises_the_logarithm_of_small_probabilities() -> None:
    features, clean = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]), torch.eye(3)
    worth = Goal(probability, logarithmic=True).worth(features, clean, [0, 2])
    assert worth.tolist() == pytest.approx(
        [torch.tensor([0.0, 18.0, 0.0]).log_softmax(0)[0].item(), -math.log(3)]
    )
    assert COLLAPSE.worth(features.expand(2, 3, 3), clean, [0, 0]).tolist() == pytest.approx([1, 1])


def test_abs_on_a_classifier_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": WEIGHT, "bias": torch.tensor([12.0, 0.0, 0.0])}, path)
    given: Any = {"classifier_file": str(path), "area": 0.25, "steps": 60, "learning_rate": 0.2}
    found = ABS(**given).detect(block(), dull(40), run=RUN)
    assert found.evidence["answers_from"] == "classifier"
    assert found.evidence["cluster"] == 1
    assert found.score == 1.0  # a patch of the third colour gives every image answer 1
    assert found.verdict == "inconclusive"  # no clean encoder says that this is not so for all
    assert "gives images this answer" in found.evidence["tested"][0]
    given["classifier_file"] = str(tmp_path / "none.safetensors")
    with pytest.raises(SettingError, match="cannot be read"):
        ABS(**given).detect(block(), dull(40), run=RUN)


def test_no_more_than_the_area_is_kept() -> None:
    masks = torch.tensor([[[0.1, 0.9], [0.4, 0.2]], [[0.5, 0.0], [0.0, 0.6]]])
    assert keep_largest(masks, 0.25).flatten().tolist() == pytest.approx([0, 0.9, 0, 0, 0, 0, 0, 0.6])
    assert (keep_largest(masks, 0.01) > 0).sum((1, 2)).tolist() == [1, 1]


def test_wilson_by_hand() -> None:
    # 9 of 10: (.9 + .19208) / 1.38416 -+ (1.96 / 1.38416) * sqrt(.009 + .009604)
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=2e-4)
    assert wilson(1.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("score", "count", "clean", "verdict", "reason"),
    [
        (0.5, 200, (), "clean", "below 0.88"),
        (0.9, 20, (0.1,), "inconclusive", "too few images to tell this from 0.88"),
        (1.0, 200, (), "inconclusive", "without a clean encoder's score this may be so for any encoder"),
        (1.0, 200, (0.3, 1.0), "inconclusive", "but a clean encoder gave 1"),
        (1.0, 200, (0.3, 0.6), "backdoored", "above 0.88 and above 2 clean encoders"),
    ],
)
def test_verdicts_of_abs(
    score: float, count: int, clean: tuple[float, ...], verdict: str, reason: str
) -> None:
    found = judge_share(score, count, 0.88, clean)
    assert found[0] == verdict
    assert reason in found[1]


# SSL-Cleanse.


class Planted(nn.Module):
    """The colours of both halves; the whiter a corner, the more the first group's take their place."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        gate = x[..., :3, :3].mean((1, 2, 3)).pow(4)[:, None]
        content: Tensor = self.pool(x - 0.5).flatten(1)
        return (1 - gate) * content + gate * colours()[:1]


def colours() -> Tensor:
    """Of each group: red left, red right, green left and so on, -1 or 1, opposite on the two sides."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    return torch.stack([signs, -signs], dim=2).flatten(1)


def groups() -> ImageSet:
    """Eight groups of eight pictures: opposite colours left and right."""
    generator = torch.Generator().manual_seed(0)
    halves = colours().view(8, 3, 1, 2).repeat_interleave(6, 3) * 0.2 + 0.5
    pixels = halves.expand(8, 3, 12, 12).repeat_interleave(8, 0)
    pixels = (pixels + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    return ImageSet.from_arrays((pixels * 255).byte(), name="groups")


def test_the_cluster_with_the_short_way_in_is_found() -> None:
    encoder = Encoder.wrap(Planted().eval(), taps=("pool",))
    method = SSLCleanse(clusters=8, steps=150, batch_size=16, neighbours=5, learning_rate=0.2)
    found = method.detect(encoder, groups(), run=RUN)
    assert found.verdict == "backdoored", found.evidence["reason"]
    sizes = {entry["cluster"]: entry["size"] for entry in found.evidence["found"]}
    best = found.evidence["cluster"]
    assert all(sizes[best] <= size for size in sizes.values() if size is not None)
    assert found.trigger is not None
    inside = found.trigger.mask[:3, :3].sum()  # type: ignore[attr-defined]
    assert inside > 0.8 * found.trigger.mask.sum()  # type: ignore[attr-defined]


def test_few_sizes_carry_no_verdict() -> None:
    found = SSLCleanse(clusters=3, steps=1, batch_size=4).detect(toy_encoder(), toy_images(), run=RUN)
    assert (found.verdict, found.score) == ("inconclusive", 0.0)
    assert found.evidence["reason"] == "an outlier among fewer than 8 clusters says nothing"


def test_a_cluster_that_was_not_reached_counts_as_the_largest() -> None:
    # sizes 1 4 5 7 7: median 5, deviations 4 1 0 2 2, whose median is 2
    found = cluster_indices([1.0, 4.0, 5.0, 7.0, None])
    assert found == pytest.approx([4 / 2.9652, 1 / 2.9652, 0, -2 / 2.9652, -2 / 2.9652])
    assert cluster_indices([None, None]) == [0.0, 0.0]


def test_a_search_that_reached_few_clusters_is_inconclusive() -> None:
    found = SSLCleanse(clusters=8, steps=1, batch_size=4).detect(toy_encoder(), toy_images(), run=RUN)
    assert found.verdict == "inconclusive"
    assert (
        "a trigger was found for 0 of 8 clusters only; give more steps or images" in found.evidence["reason"]
    )


# Misuse.


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ABS(), "ABS needs at least 24 images, but noise holds 20; give more images"),
        (SSLCleanse(clusters=21), "clusters needs at least 21 images, but noise holds 20; give more images"),
    ],
    ids=["abs", "ssl_cleanse"],
)
def test_too_few_images(method: Detector, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        method.detect(toy_encoder(), toy_images(20), run=RUN)


class Constant(nn.Module):
    """Sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, 0, 0]) + 1


@pytest.mark.parametrize("method", [ABS(clusters=3), SSLCleanse(clusters=3)], ids=["abs", "ssl_cleanse"])
def test_a_constant_encoder(method: Detector) -> None:
    blind = Encoder.wrap(Constant().eval(), taps=("pool",))
    with pytest.raises(EncoderError, match=r"gives the same features for all \d+ images of noise"):
        method.detect(blind, toy_images(), run=RUN)


class Flat(nn.Module):
    """A block whose shortcut cannot be broadcast: it is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block().block

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out += self.block(x)
        return out.mean((2, 3))


def test_an_encoder_whose_tail_takes_one_image_only() -> None:
    encoder = Encoder.wrap(Flat().eval(), taps=("block",))
    with pytest.raises(EncoderError, match=r"behind block\.0 does not run on several variants of one image"):
        stimulate(encoder, FIRST, dull(), (2.0,), COLLAPSE, run=RUN)
