"""The pure functions: losses, augmentation, dependence measures, layer weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as reference

from encoderguard.augment import SIMCLR, SIMCLR_NO_CROP, Augmentation, adjust_hue
from encoderguard.disturbance import random_noise, random_patches
from encoderguard.information import gaussian_information, layer_weights
from encoderguard.losses import (
    attention_loss,
    attention_map,
    cosine_distance,
    nt_xent,
    random_directions,
    sliced_wasserstein2,
)
from encoderguard.mine import mine
from encoderguard.random import Rng


def images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=Rng(3).generator())


def test_cosine_distance_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert cosine_distance(a, b).item() == pytest.approx(1 - (1 + 0) / 2)


def test_nt_xent_by_hand() -> None:
    # two pairs of equal views at right angles: each view has its twin at cosine 1 and two others at cosine 0
    a = torch.eye(2)
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert nt_xent(a, a.clone(), 0.5).item() == pytest.approx(expected, abs=1e-5)


def test_attention_map_by_hand() -> None:
    stage = torch.zeros(1, 2, 1, 2)
    stage[0, :, 0, 0] = torch.tensor([1.0, -2.0])  # 1 + 4
    stage[0, :, 0, 1] = torch.tensor([0.0, 1.0])  # 1
    expected = torch.tensor([[5.0, 1.0]]) / math.sqrt(26)
    assert torch.allclose(attention_map(stage), expected)


def test_attention_loss_reductions_by_hand() -> None:
    one, other = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    one[..., 0], other[..., 1] = 1.0, 1.0  # unit maps at right angles
    assert attention_loss(one, other, reduction="l2").item() == pytest.approx(math.sqrt(2), abs=1e-5)
    assert attention_loss(one, other, reduction="mean").item() == pytest.approx(2 / 2, abs=1e-5)


@given(scale=st.floats(0.1, 50))
def test_attention_ignores_the_scale_of_a_stage(scale: float) -> None:
    stage = torch.rand(2, 3, 4, 4, generator=Rng(0).generator()) + 0.1
    assert attention_loss(stage, scale * stage).item() < 1e-4


def test_attention_of_identical_maps_has_a_finite_gradient() -> None:
    stage = torch.rand(2, 3, 4, 4, requires_grad=True)
    torch.autograd.backward(attention_loss(stage, stage.detach()))
    assert stage.grad is not None
    assert bool(stage.grad.isfinite().all())


def test_sliced_wasserstein_by_hand() -> None:
    a, b = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [5.0, 4.0]])
    axes = torch.eye(2)
    # first axis: 0 and 3 against 1 and 5; second: 1 and 1 against 1 and 4
    assert sliced_wasserstein2(a, b, axes).item() == pytest.approx((1 + 4 + 0 + 9) / 4)
    assert sliced_wasserstein2(a, a.flip(0), axes).item() == 0  # samples have no order


def test_sliced_wasserstein_of_gaussians() -> None:
    draws = Rng(0).generator()
    a, b = torch.randn(8000, 3, generator=draws), torch.randn(8000, 3, generator=draws)
    shift = torch.tensor([1.0, -2.0, 0.5])
    directions = random_directions(64, 3, draws)
    assert torch.allclose(directions.norm(dim=1), torch.ones(64))
    # N(0, I) against N(m, s^2 I), along each direction w: (m . w)^2 + (s - 1)^2
    truth = (directions @ shift).square().mean().item() + (3 - 1) ** 2
    assert sliced_wasserstein2(a, shift + 3 * b, directions).item() == pytest.approx(truth, rel=0.05)
    # and over all directions |m|^2 / D + (s - 1)^2
    many = random_directions(2000, 3, draws)
    expected = shift.square().sum().item() / 3 + 4
    assert sliced_wasserstein2(a, shift + 3 * b, many).item() == pytest.approx(expected, rel=0.1)


def test_sliced_wasserstein_has_a_finite_gradient_at_zero() -> None:
    a = torch.rand(4, 3, requires_grad=True)
    torch.autograd.backward(sliced_wasserstein2(a, a.detach(), torch.eye(3)))
    assert a.grad is not None
    assert bool(a.grad.isfinite().all())


def test_hue_is_torchvisions() -> None:
    batch, shifts = images(4), torch.tensor([0.1, -0.1, 0.5, -0.3])
    ours = adjust_hue(batch, shifts)
    theirs = torch.stack(
        [reference.adjust_hue(image, float(shift)) for image, shift in zip(batch, shifts, strict=True)]
    )
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("augmentation", [SIMCLR, SIMCLR_NO_CROP])
def test_views_keep_shape_range_and_seed(augmentation: Augmentation) -> None:
    batch = images(32)
    first = augmentation(batch, Rng(0).generator("views"))
    again = augmentation(batch, Rng(0).generator("views"))
    other = augmentation(batch, Rng(1).generator("views"))
    assert first.shape == batch.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_sample_gets_its_own_draw() -> None:
    same = images(1).expand(16, -1, -1, -1)
    views = SIMCLR(same, Rng(0).generator())
    assert len({view.sum().item() for view in views}) == 16


def test_views_without_any_operation_are_the_images() -> None:
    nothing = Augmentation(crop_scale=None, flip=0, jitter=0, grey=0)
    batch = images()
    assert torch.allclose(nothing(batch, Rng(0).generator()), batch, atol=1e-6)
    whole = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter=0, grey=0)
    assert torch.allclose(whole(batch, Rng(0).generator()), batch, atol=1e-5)


def test_flip_and_grey_always() -> None:
    batch = images()
    flipped = Augmentation(crop_scale=None, flip=1, jitter=0, grey=0)(batch, Rng(0).generator())
    assert torch.equal(flipped, batch.flip(-1))
    grey = Augmentation(crop_scale=None, flip=0, jitter=0, grey=1)(batch, Rng(0).generator())
    assert torch.allclose(grey, reference.rgb_to_grayscale(batch, 3), atol=1e-4)


@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation"])
def test_single_colour_operations_are_torchvisions(field: str) -> None:
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, field: 0.4}
    batch = images(4)
    only = Augmentation(crop_scale=None, flip=0, jitter=1, grey=0, **strengths)  # type: ignore[arg-type]
    ours = only(batch, Rng(0).generator())
    row = {"brightness": 6, "contrast": 7, "saturation": 8}[field]
    factors = 1 + 0.4 * (2 * torch.rand((12, 4), generator=Rng(0).generator())[row] - 1)
    adjust = getattr(reference, f"adjust_{field}")
    theirs = torch.stack([adjust(image, float(f)) for image, f in zip(batch, factors, strict=True)])
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_random_patches() -> None:
    batch = images(64, 32)
    assert random_patches(batch, 0.0, Rng(0).generator()) is batch
    covered = random_patches(batch, 1.0, Rng(0).generator())
    share = (covered != batch).any(1).flatten(1).float().mean(1)
    assert bool(((share >= 3 * 3 / 1024) & (share <= 17 * 17 / 1024)).all())
    half = (random_patches(batch, 0.5, Rng(1).generator()) != batch).flatten(1).any(1).float().mean()
    assert 0.25 < half < 0.75


def test_random_patches_are_grids_of_up_to_four_cells_half_of_them_of_full_colours() -> None:
    grey = torch.full((400, 3, 32, 32), 0.5)
    covered = random_patches(grey, 1.0, Rng(2).generator())
    assert covered.min() >= 0
    assert covered.max() <= 1
    counts, full = [], []
    for image in covered:
        colours = image.flatten(1).T.unique(dim=0)
        own = colours[(colours != 0.5).all(1)]
        counts.append(len(own))
        full.append(bool(((own == 0) | (own == 1)).all()))
    assert set(counts) <= set(range(1, 17))
    assert sum(count == 1 for count in counts) > 100  # a third are of one cell
    assert sum(count > 4 for count in counts) > 50
    assert 0.4 < sum(full) / len(full) < 0.6


def test_random_noise_is_blended_by_up_to_half_and_grey_in_every_second_image() -> None:
    black = torch.zeros(400, 3, 16, 16)
    assert random_noise(black, 0.0, Rng(0).generator()) is black
    noisy = random_noise(black, 1.0, Rng(0).generator())
    weights = noisy.flatten(1).amax(1)  # 768 draws come close to 1
    assert 0.45 < float(weights.max()) <= 0.5
    assert float(weights.mean()) == pytest.approx(0.25, abs=0.03)
    means = noisy.flatten(1).mean(1) / weights
    assert float(means.mean()) == pytest.approx(0.5, abs=0.01)
    grey = (noisy == noisy[:, :1]).flatten(1).all(1)
    assert 0.4 < float(grey.float().mean()) < 0.6
    touched = (random_noise(black, 0.3, Rng(1).generator()) > 0).flatten(1).any(1).float().mean()
    assert 0.2 < float(touched) < 0.4
    assert bool((random_noise(black + 1, 1.0, Rng(2).generator()) <= 1).all())


def test_layer_weights_by_hand() -> None:
    values = [1.0, 3.0]
    assert layer_weights(values, "share", alpha0=1, alpha1=4) == pytest.approx([2.0, 4.0])
    assert layer_weights(values, "uniform", alpha0=1, alpha1=4) == pytest.approx([3.0, 3.0])
    # z-scores are -1 and 1; the negative weight that the paper's formula gives is clamped
    assert layer_weights(values, "zscore", alpha0=0.5, alpha1=2) == pytest.approx([0.0, 2.5])


def test_layer_weights_without_information_are_uniform() -> None:
    assert layer_weights([-1.0, float("nan")], "share", alpha0=1, alpha1=4) == [3.0, 3.0]
    assert layer_weights([2.0, 2.0], "zscore", alpha0=1, alpha1=4) == [1.0, 1.0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.sampled_from(["share", "zscore", "uniform"]))
def test_layer_weights_are_never_negative(values: list[float], weighting: str) -> None:
    beta = layer_weights(values, weighting, alpha0=1.0, alpha1=10.0)  # type: ignore[arg-type]
    assert len(beta) == len(values)
    assert all(math.isfinite(weight) and weight >= 0 for weight in beta)


def gaussian_pairs(rho: float, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two four-dimensional Gaussians of known mutual information: -d/2 log(1 - rho^2) nats."""
    x, noise = (torch.randn(count, 4, generator=Rng(i).generator()) for i in (0, 1))
    return x, rho * x + math.sqrt(1 - rho * rho) * noise, -2 * math.log(1 - rho * rho)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_gaussian_information_of_gaussians(rho: float) -> None:
    x, y, truth = gaussian_pairs(rho)
    assert gaussian_information(x, y) == pytest.approx(truth, abs=0.15)


def test_held_out_mine_of_gaussians_and_its_in_sample_bias() -> None:
    x, y, truth = gaussian_pairs(0.8)
    _, held_out = mine(x, y, rng=Rng(0), epochs=40, hidden=64)
    assert held_out == pytest.approx(truth, abs=0.5)
    assert held_out <= truth + 0.1  # a lower bound, up to the noise of the held-out half
    shuffled = y[torch.randperm(len(y), generator=Rng(5).generator())]
    in_sample, null = mine(x, shuffled, rng=Rng(0), epochs=40, hidden=64)
    assert null < 0.1
    assert in_sample > null  # why in-sample values mean little


def test_mine_repeats() -> None:
    x, y, _ = gaussian_pairs(0.6, 200)
    assert mine(x, y, rng=Rng(1), epochs=3) == mine(x, y, rng=Rng(1), epochs=3)
    assert math.isnan(mine(x, y, rng=Rng(1), epochs=1, hold_out=False)[1])
