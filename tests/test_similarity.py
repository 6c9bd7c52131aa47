import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from encoderguard.errors import ImageError
from encoderguard.random import Rng
from encoderguard.similarity import (
    debiased_linear_cka,
    embedding_map,
    mean_pairwise_cosine,
    neighbour_overlap,
    standardise,
    z_score,
)

seeds = st.integers(0, 2**32)


def gauss(seed: int, *shape: int, part: str = "x") -> Tensor:
    return torch.randn(*shape, generator=Rng(seed).generator(part), dtype=torch.float64)


def rotation(seed: int, dim: int) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(gauss(seed, dim, dim, part="rotation")).Q
    return orthogonal


def brute_hsic(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    total = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    return total / (n * (n - 3))


# mean pairwise cosine


def test_cosine_of_three_known_vectors() -> None:
    # Pairs: (e1, e2) 0, (e1, -e1) -1, (e2, -e1) 0; lengths do not matter.
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-5.0, 0.0]])
    assert mean_pairwise_cosine(z).item() == pytest.approx(-1 / 3)


def test_cosine_of_equal_rows_is_one_and_a_zero_row_counts_as_unrelated() -> None:
    assert mean_pairwise_cosine(torch.ones(5, 3)).item() == pytest.approx(1)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).item() == 0


@given(seed=seeds, n=st.integers(2, 12), dim=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_cosine_equals_the_mean_over_all_pairs_and_ignores_rotation_and_scale(
    seed: int, n: int, dim: int
) -> None:
    z = gauss(seed, n, dim)
    cosines = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
    brute = cosines[~torch.eye(n, dtype=torch.bool)].mean()
    scales = gauss(seed, n, 1, part="scale").abs() + 0.1
    torch.testing.assert_close(mean_pairwise_cosine(z), brute)
    torch.testing.assert_close(mean_pairwise_cosine(z * scales @ rotation(seed, dim)), brute)


def test_cosine_takes_leading_dimensions_and_gradients() -> None:
    z = gauss(0, 2, 5, 3).requires_grad_()
    value = mean_pairwise_cosine(z)
    torch.testing.assert_close(value, torch.stack([mean_pairwise_cosine(z[0]), mean_pairwise_cosine(z[1])]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient.abs().sum() > 0


def test_cosine_needs_two_rows() -> None:
    with pytest.raises(ImageError, match="needs at least 2 images, found 1"):
        mean_pairwise_cosine(torch.ones(1, 3))


# standardise


def test_standardise_uses_the_reference() -> None:
    reference = torch.tensor([[0.0, 10.0], [2.0, 14.0]])  # means 1 and 12, deviations 1 and 2
    torch.testing.assert_close(
        standardise(torch.tensor([[3.0, 12.0]]), reference), torch.tensor([[2.0, 0.0]])
    )


def test_standardise_makes_positive_features_dissimilar() -> None:
    z = gauss(0, 400, 50).abs()
    assert mean_pairwise_cosine(z) > 0.6
    assert mean_pairwise_cosine(standardise(z, z)).abs() < 0.01


def test_standardise_bounds_a_dimension_that_is_silent_on_the_reference() -> None:
    reference = torch.tensor([[0.0, 5.0], [2.0, 5.0]])  # deviations 1 and 0: root mean square sqrt(1/2)
    found = standardise(torch.tensor([[1.0, 6.0]]), reference, floor=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2 * 2**0.5]]))


def test_standardise_only_centres_by_a_constant_reference() -> None:
    torch.testing.assert_close(
        standardise(torch.full((2, 2), 4.0), torch.ones(3, 2)), torch.full((2, 2), 3.0)
    )


# debiased CKA


@given(seed=seeds, n=st.integers(5, 14), d=st.integers(1, 20), e=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_cka_equals_the_kernel_form(seed: int, n: int, d: int, e: int) -> None:
    x, y = gauss(seed, n, d) + 3, gauss(seed, n, e, part="y")
    k, m = x @ x.T, y @ y.T
    brute = brute_hsic(k, m) / (brute_hsic(k, k) * brute_hsic(m, m)).sqrt()
    assert debiased_linear_cka(x, y) == pytest.approx(brute.item(), abs=1e-6)


@given(seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
@settings(max_examples=25, deadline=None)
def test_cka_is_one_for_the_same_space_rotated_scaled_and_shifted(
    seed: int, scale: float, shift: float
) -> None:
    x, y = gauss(seed, 30, 6), gauss(seed, 30, 4, part="y")
    moved = scale * x @ rotation(seed, 6) + shift
    assert debiased_linear_cka(x, moved) == pytest.approx(1, abs=1e-6)
    assert debiased_linear_cka(moved, y) == pytest.approx(debiased_linear_cka(x, y), abs=1e-6)
    assert debiased_linear_cka(y, x) == pytest.approx(debiased_linear_cka(x, y), abs=1e-9)


def test_cka_of_independent_features_is_zero_even_with_more_dimensions_than_images() -> None:
    found = [debiased_linear_cka(gauss(i, 60, 300), gauss(i, 60, 300, part="y")) for i in range(10)]
    assert np.mean(found) == pytest.approx(0, abs=0.02)  # the biased estimate would be above 0.8


def test_cka_of_a_collapsed_space_is_zero() -> None:
    x = gauss(0, 10, 3)
    assert debiased_linear_cka(x, torch.full((10, 3), 0.1)) == 0
    assert debiased_linear_cka(torch.zeros(10, 3), torch.zeros(10, 3)) == 0


def test_cka_refuses_too_few_or_unpaired_rows() -> None:
    with pytest.raises(ImageError, match="needs at least 4 images, found 3"):
        debiased_linear_cka(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ImageError, match="same images, but found 5 and 6 rows"):
        debiased_linear_cka(torch.ones(5, 2), torch.ones(6, 2))


# neighbour overlap


def test_overlap_of_known_neighbours() -> None:
    # Angles in degrees; nearest by angle: x pairs (0, 10) and (90, 100); in y the first two moved apart.
    def at(*degrees: float) -> Tensor:
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    x, y = at(0, 10, 90, 100), at(0, 80, 90, 101)
    # nearest in x: 1, 0, 3, 2; nearest in y: 1, 2, 1, 2
    assert neighbour_overlap(x, y, k=1) == 0.5
    assert neighbour_overlap(x, y, k=3) == 1  # everyone is a neighbour of everyone
    assert neighbour_overlap(x, y, k=99) == 1


@given(seed=seeds, k=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_overlap_equals_comparing_sorted_lists_and_ignores_rotation_and_scale(seed: int, k: int) -> None:
    x, y = gauss(seed, 20, 5), gauss(seed, 20, 3, part="y")

    def lists(z: Tensor) -> list[set[int]]:
        cosine = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T).tolist()
        return [set(sorted(set(range(20)) - {i}, key=lambda j: -row[j])[:k]) for i, row in enumerate(cosine)]

    brute = np.mean([len(a & b) / k for a, b in zip(lists(x), lists(y), strict=True)])
    assert neighbour_overlap(x, y, k) == pytest.approx(brute)
    assert neighbour_overlap(x, 7 * x @ rotation(seed, 5), k) == 1


def test_overlap_of_unrelated_spaces_is_chance() -> None:
    assert neighbour_overlap(gauss(0, 1100, 8), gauss(1, 1100, 8)) == pytest.approx(10 / 1099, abs=0.005)


# embedding map


def test_map_keeps_the_distances_of_points_in_a_plane() -> None:
    plane = gauss(0, 12, 2) @ rotation(1, 5)[:2]
    found = embedding_map(plane)
    assert found.shape == (12, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        torch.cdist(found, found), torch.cdist(plane, plane).float(), atol=1e-5, rtol=1e-4
    )
    assert found[:, 0].var() >= found[:, 1].var()


@pytest.mark.parametrize("z", [torch.ones(1, 4), torch.ones(6, 4), torch.zeros(3, 1)])
def test_map_of_what_does_not_vary_is_zero(z: Tensor) -> None:
    torch.testing.assert_close(embedding_map(z), torch.zeros(len(z), 2))


def test_map_of_one_dimension_uses_one_coordinate() -> None:
    found = embedding_map(torch.tensor([[0.0], [1.0], [5.0]]))
    assert (found[:, 1] == 0).all()
    torch.testing.assert_close((found[2, 0] - found[0, 0]).abs(), torch.tensor(5.0))


# z-score


def test_z_score_of_four_vectors_by_hand() -> None:
    clean = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])  # cosines 0, 1, 0: mean 1/3, variance 2/9
    triggered = torch.tensor([[1.0, 1.0], [5.0, 5.0]])  # cosine 1
    assert z_score(clean, triggered) == pytest.approx((1 - 1 / 3) / (2 / 9))
    assert z_score(clean, triggered, "var") == pytest.approx(3)
    assert z_score(clean, triggered, "std") == pytest.approx((2 / 3) / (2 / 9) ** 0.5)
    assert z_score(clean, clean) == pytest.approx(0)


@given(seeds, st.integers(3, 12))
def test_z_score_equals_the_sum_over_pairs(seed: int, n: int) -> None:
    clean, triggered = gauss(seed, n, 5), gauss(seed, 4, 5, part="y")
    unit = F.normalize(clean, dim=1)
    pairs = torch.stack([unit[i] @ unit[j] for i in range(n) for j in range(n) if i != j])
    expected = (mean_pairwise_cosine(triggered) - pairs.mean()) / pairs.std(correction=0)
    assert z_score(clean, triggered, "std") == pytest.approx(float(expected), rel=1e-6)


def test_z_score_needs_more_than_one_clean_pair() -> None:
    with pytest.raises(ImageError, match="The dispersion of a z-score needs at least 3 images, found 2"):
        z_score(gauss(0, 2, 4), gauss(1, 9, 4))
