"""The bank of candidate triggers, its rays, the measure of collapse, and refinement by gradients."""

import json
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.bank import bank
from encoderguard.collapse import Collapse
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError, SettingError
from encoderguard.images import ImageSet
from encoderguard.parametrisations import BoundedAdditive, FreePattern
from encoderguard.random import Rng
from encoderguard.rays import FAMILIES, LEVELS, Ray, additive_ray, blend_ray, patch_mask, patch_ray
from encoderguard.refinement import RefinePlan, refine
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine, standardise
from encoderguard.triggers import Additive, ColourMap, MaskedPattern, Patch, Warp, trigger_from_dict

RUN = Run(rng=Rng(0), precision="float32")
SHAPE = (16, 12)


def pixels(count: int = 6, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.rand(count, 3, *shape, generator=Rng(1).generator())


def everything(**settings: object) -> list[Ray]:
    return [ray for rays in bank(SHAPE, Rng(0), **settings).values() for ray in rays]  # type: ignore[arg-type]


def test_the_size_of_every_family() -> None:
    sizes = {family: len(rays) for family, rays in bank((32, 32), Rng(0)).items()}
    assert sizes == {
        "patch": 43 * 3 + 8 * 9,
        "blend": 24,
        "noise": 12,
        "spectral": 33,
        "colour": 23,
        "warp": 10,
    }
    assert tuple(sizes) == FAMILIES == tuple(LEVELS)


def test_a_scaled_bank_keeps_four_of_every_family() -> None:
    sizes = {family: len(rays) for family, rays in bank((32, 32), Rng(0), scale=0.1).items()}
    assert sizes == {"patch": 20, "blend": 4, "noise": 4, "spectral": 4, "colour": 4, "warp": 4}


def test_the_white_square_in_the_corner_is_in_the_bank() -> None:
    images = pixels(2, (32, 32))
    white = Patch(size=10, margin=1)(images)
    assert any(torch.equal(ray.at(ray.strength)(images), white) for ray in bank((32, 32), Rng(0))["patch"])


def test_every_candidate_stamps_at_every_level_and_has_a_json_form() -> None:
    images = pixels(2)
    for ray in everything(scale=0.3):
        assert ray.strength in LEVELS[ray.family]
        for level in LEVELS[ray.family]:
            stamped = ray.at(level)(images)
            assert stamped.shape == images.shape
            assert float(stamped.min()) >= 0
            assert float(stamped.max()) <= 1
        trigger = ray.at(ray.strength)
        assert trigger_from_dict(json.loads(json.dumps(trigger.to_dict()))) == trigger


def test_a_stronger_level_changes_more() -> None:
    images = pixels()
    for ray in everything():
        if ray.family in ("blend", "noise", "spectral", "colour"):
            low, high = (
                ray.at(level)(images) - images for level in (LEVELS[ray.family][0], LEVELS[ray.family][-1])
            )
            assert float(low.abs().mean()) < float(high.abs().mean()), ray.label


def test_the_bank_is_a_function_of_its_seed() -> None:
    images = pixels()
    same, again, other = (
        [ray.at(ray.strength)(images) for ray in bank(SHAPE, Rng(seed))["patch"]] for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_a_grey_bank_leaves_grey_images_grey() -> None:
    images = torch.rand(4, 1, *SHAPE, generator=Rng(2).generator()).expand(-1, 3, -1, -1)
    for ray in everything(grey=True):
        stamped = ray.at(ray.strength)(images)
        assert float((stamped - stamped.mean(1, keepdim=True)).abs().max()) < 1e-5, ray.label
    assert any(ray.family == "colour" for ray in everything(grey=True))


def test_a_patch_goes_where_its_place_says() -> None:
    mask, rows, columns = patch_mask((16, 16), 0.25, (0.0, 1.0))
    assert (rows, columns) == (slice(0, 4), slice(12, 16))
    assert float(mask.sum()) == 16
    ray = patch_ray((16, 16), torch.ones(3, 1, 1), (1.0, 1.0), label="white", strength=0.25)
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(ray.at(0.25)(images), Patch(size=4, margin=0)(images))
    assert float(ray.at(0.5)(images).sum()) == 3 * 64


def test_rays_of_one_channel_share_it() -> None:
    images = pixels()
    blend = blend_ray(torch.full((1, *SHAPE), 0.5), label="grey", strength=0.2)
    assert torch.allclose(blend.at(0.2)(images), 0.8 * images + 0.1)
    noise = additive_ray("noise", torch.ones(1, *SHAPE), label="lighter", strength=0.1)
    assert torch.allclose(noise.at(0.1)(images), (images + 0.1).clamp(max=1))


def test_a_colour_map_by_hand() -> None:
    swap = ColourMap(matrix=((0, 0, 1), (0, 1, 0), (1, 0, 0)), offset=(0.0, 0.1, 0.0), strength=0.5)
    image = torch.tensor([0.2, 0.4, 0.8]).view(1, 3, 1, 1)
    assert torch.allclose(swap(image).flatten(), torch.tensor([0.5, 0.45, 0.5]))
    with pytest.raises(SettingError, match="'strength' of a colour_map trigger is not valid"):
        ColourMap(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)), strength=2.0)


def test_a_warp_moves_pixels_by_its_strength() -> None:
    ramp = torch.linspace(0, 1, 33)[:32].view(1, 1, 1, 32).expand(1, 3, 32, 32)
    weak, strong = (Warp(seed=1, strength=strength)(ramp) - ramp for strength in (0.02, 0.08))
    assert 0 < float(weak.abs().mean()) < float(strong.abs().mean())
    assert (
        float(weak.abs().mean()) < 0.04
    )  # the ramp rises by its side's share: at most the displacement itself
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(Warp(strength=0.05)(flat), flat)


class Mean(nn.Module):
    """Six features: the mean colours of the upper and of the lower half."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.pool(x), 1)


def toy() -> Encoder:
    return Encoder.wrap(Mean(), taps=("pool",))


def image_set(count: int = 12) -> ImageSet:
    return ImageSet.from_arrays((pixels(count, (16, 16)) * 255).round().byte(), name="noise")


def test_collapse_is_the_mean_cosine_of_standardised_features() -> None:
    collapse = Collapse(toy(), image_set(), run=RUN)
    trigger = Patch(size=8, margin=0)
    with torch.no_grad():
        clean, stamped = toy()(collapse.pixels), toy()(trigger(collapse.pixels))
    expected = float(mean_pairwise_cosine(standardise(stamped, clean)))
    assert collapse.of([trigger]) == pytest.approx([expected], abs=1e-5)
    white = MaskedPattern(torch.ones(16, 16), torch.ones(3, 16, 16))
    assert collapse.of([white, trigger]) == pytest.approx([1.0, expected], abs=1e-5)
    assert abs(collapse.of([Additive(torch.zeros(3, 16, 16))])[0]) < 0.2


def test_displacement_is_one_minus_the_cosine_of_an_image_and_its_stamped_copy() -> None:
    collapse = Collapse(toy(), image_set(), run=RUN)
    trigger = Patch(size=8, margin=0)
    with torch.no_grad():
        clean, stamped = (
            standardise(toy()(x), collapse.clean) for x in (collapse.pixels, trigger(collapse.pixels))
        )
    expected = 1 - float(F.cosine_similarity(clean, stamped, dim=1).mean())
    still, moved = collapse.measure([Additive(torch.zeros(3, 16, 16)), trigger])
    assert still.displacement == pytest.approx(0, abs=1e-5)
    assert moved.displacement == pytest.approx(expected, abs=1e-5)
    few = 1 - float(F.cosine_similarity(clean[:4], stamped[:4], dim=1).mean())
    assert collapse.measure([trigger], count=4)[0].displacement == pytest.approx(few, abs=1e-5)


def test_a_deadline_cuts_the_list_but_not_the_first_batch() -> None:
    collapse = Collapse(toy(), image_set(), run=RUN)
    triggers = [Patch(size=4)] * 50
    assert len(collapse.of(triggers, deadline=time.monotonic() - 1)) == 256 // 12
    assert len(collapse.of(triggers)) == 50


def test_the_nearest_images_look_like_what_all_collapse_to() -> None:
    dark = torch.full((10, 3, 16, 16), 40, dtype=torch.uint8)
    noise = torch.randint(0, 20, dark.shape, generator=Rng(3).generator(), dtype=torch.uint8)
    bright = torch.full((2, 3, 16, 16), 240, dtype=torch.uint8)
    collapse = Collapse(toy(), ImageSet.from_arrays(torch.cat([dark + noise, bright])), run=RUN)
    white = MaskedPattern(torch.full((16, 16), 0.9), torch.ones(3, 16, 16))
    places, cosines = collapse.nearest(white, 2)
    assert sorted(places.tolist()) == [10, 11]
    assert float(cosines.min()) > 0.9


def test_collapse_needs_two_images() -> None:
    with pytest.raises(ImageError, match="Measuring a collapse needs at least 2 images"):
        Collapse(toy(), image_set(1), run=RUN)


def bright(features: Tensor) -> Tensor:
    """Smaller the brighter the stamped images are."""
    return -features.mean((1, 2))


def test_refinement_whitens_a_patch_and_drops_the_worse_starts() -> None:
    masks = torch.stack([patch_mask((16, 16), side, (0.5, 0.5))[0] for side in (0.25, 0.5, 0.5, 0.125)])
    starts = FreePattern(masks, torch.full((4, 3, 16, 16), 0.5))
    data = pixels(8, (16, 16)) / 2
    plan = RefinePlan(steps=20, rungs=(4, 8), batch_size=4)
    found = refine(toy(), data, bright, starts, 4, plan=plan, run=RUN)
    assert len(found) == 1
    trigger = found[0].trigger
    assert isinstance(trigger, MaskedPattern)
    assert found[0].start in (1, 2)
    assert float(trigger.pattern[:, trigger.mask > 0].min()) > 0.9


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_the_best_comes_first_also_where_the_last_step_is_a_rung(steps: int) -> None:
    masks = torch.stack([patch_mask((16, 16), side, (0.5, 0.5))[0] for side in (0.125, 0.25, 0.5, 0.125)])
    starts = FreePattern(masks, torch.full((4, 3, 16, 16), 0.5))
    plan = RefinePlan(steps=steps, rungs=(5,))
    found = refine(toy(), pixels(8, (16, 16)) / 2, bright, starts, 4, plan=plan, run=RUN)
    assert found[0].start == 2
    assert all(refined.loss < 0 for refined in found)
    assert len(found) == (2 if steps > 5 else 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_additive_pattern_stays_within_its_bound(channels: int) -> None:
    starts = BoundedAdditive(torch.tensor([0.1, 0.2]), torch.zeros(2, channels, 16, 16))
    plan = RefinePlan(steps=15, rungs=())
    found = refine(toy(), pixels(4, (16, 16)) / 2, bright, starts, 2, plan=plan, run=RUN)
    by_start = {f.start: f.trigger for f in found}
    for start, bound in ((0, 0.1), (1, 0.2)):
        trigger = by_start[start]
        assert isinstance(trigger, Additive)
        assert trigger.pattern.shape == (3, 16, 16)
        assert 0.8 * bound < float(trigger.pattern.min()) <= float(trigger.pattern.max()) <= bound


def test_refinement_ends_at_its_deadline() -> None:
    calls: list[int] = []

    def counted(features: Tensor) -> Tensor:
        calls.append(len(features))
        return bright(features)

    masks = patch_mask((16, 16), 0.5, (0, 0))[0][None].expand(2, -1, -1)
    starts = FreePattern(masks, torch.full((2, 3, 16, 16), 0.5))
    objective: Callable[[Tensor], Tensor] = counted
    found = refine(toy(), pixels(4, (16, 16)), objective, starts, 2, plan=RefinePlan(), run=RUN, deadline=0.0)
    assert calls == [2]
    assert len(found) == 2
