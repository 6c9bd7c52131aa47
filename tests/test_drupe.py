"""DRUPE: terms by hand, the weights of each epoch, how c and c1 move."""

import math

import pytest
import torch

from encoderguard.attacks.drupe import DRUPE, Costs, balance, distance, spread, weights
from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.run import Run
from tests.attack_toys import AXES, clean_encoder, features, references, shadow

NAMES = [
    "effectiveness (L0)",
    "reference (L1)",
    "utility (L2)",
    "spread (L3)",
    "balance (sigma)",
    "collapse (S)",
    "distance (W)",
]


def test_spread_by_hand() -> None:
    # three at right angles: of six pairs i <= j the three of a reference with itself have cosine 1
    assert spread(5 * AXES[:3]).item() == pytest.approx(0.5)
    assert spread(AXES[:1]).item() == pytest.approx(1.0)
    assert spread(AXES[[0, 0]]).item() == pytest.approx(1.0)


def test_balance_by_hand() -> None:
    # three of four stamped images lie at the first reference, one at the second: means .75 and .25
    assert balance(AXES[[0, 0, 0, 1]], AXES[:2]).item() == pytest.approx(math.sqrt(2 * 0.25**2), abs=1e-4)
    assert balance(AXES[[0, 1]], AXES[:2]).item() == pytest.approx(0.0, abs=1e-4)
    assert balance(AXES[[0, 1]], AXES[:1]).item() == 0.0


def test_balance_has_a_finite_gradient_where_it_is_zero() -> None:
    triggered = AXES[[0, 1]].clone().requires_grad_()
    torch.autograd.backward(balance(triggered, AXES[:2]))
    assert triggered.grad is not None
    assert bool(triggered.grad.isfinite().all())


def test_distance_by_hand() -> None:
    images = torch.tensor([[0.0, 0.0], [2.0, 2.0]])  # deviation sqrt(2) in both dimensions
    shifted = images.flip(0) + torch.tensor([3.0, 0.0])
    assert distance(shifted, images, torch.eye(2)).item() == pytest.approx(math.sqrt(9 / 2) / math.sqrt(2))
    assert distance(images.flip(0), images, torch.eye(2)).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("epoch", "level", "imbalance", "expected"),
    [
        (1, 0.6, 0.0, [0, 1, 1, 0.5, 0, 0, 0]),
        (1, 0.1, 0.0, [0, 1, 1, 0.3, 0, 0, 0]),
        (2, 0.6, 0.3, [1, 1, 1, 1, 2, 0, 0]),
        (4, 0.45, 0.3, [1, 1, 1, 0.2, 2, 0, 0]),
        (5, 0.4, 0.1, [1, 1, 1, 0, 0.6, 0.1, 0.001]),
        (5, 0.6, 0.2, [1, 1, 1, 1, 2.1, 0.1, 0.001]),
        (120, 0.3, 0.0, [1, 1, 1, 0, 0.6, 0.1, 0.001]),
    ],
)
def test_weights_by_epoch(epoch: int, level: float, imbalance: float, expected: list[float]) -> None:
    found = weights(epoch, spread=level, imbalance=imbalance, c=0.1, c1=0.001)
    assert [found[name] for name in NAMES] == pytest.approx(expected)


def outcome(effect: float, kept: float, alike: float) -> dict[str, torch.Tensor]:
    values = [effect, kept, kept, 0.0, 0.0, alike, 0.0]
    return {name: torch.tensor(value) for name, value in zip(NAMES, values, strict=True)}


def follow(*epochs: tuple[float, float, float], adapt_after: int = 0) -> list[tuple[float, float]]:
    """c and c1 at the beginning of each epoch and after the last, with two steps per epoch."""
    costs, seen = Costs(1.0, 1.0, adapt_after), []
    for epoch, values in enumerate(epochs, 1):
        seen.append(costs.at(epoch))
        costs.count(outcome(*values))
        assert costs.at(epoch) == seen[-1]
        costs.count(outcome(*values))
    return [*seen, costs.at(len(epochs) + 1)]


def test_costs_rise_while_the_attack_holds_and_fall_else() -> None:
    fall = 1.25**-1.25
    good, alike, weak, harmful = (0.03, 0.05, 0.55), (0.03, 0.05, 0.9), (0.05, 0.05, 0.55), (0.03, 0.2, 0.55)
    assert follow(good, good) == [(1, 1), (1.25, 1.25), (1.25**2, 1.25**2)]
    assert follow(alike) == [(1, 1), (1.25, pytest.approx(fall))]
    assert follow(weak) == follow(harmful) == [(1, 1), (pytest.approx(fall), pytest.approx(fall))]


def test_c_pauses_after_an_epoch_with_very_different_triggered_images() -> None:
    spread_out = (0.03, 0.05, 0.4)
    assert follow(spread_out, spread_out) == [(1, 1), (1.25, 1.25), (1.25, 1.25**2)]


def test_costs_stay_for_the_first_epochs() -> None:
    good = (0.03, 0.05, 0.55)
    assert follow(good, good, good, adapt_after=2) == [(1, 1), (1, 1), (1, 1), (1.25, 1.25)]


def test_terms_of_the_first_and_of_a_later_epoch() -> None:
    method, apart = DRUPE(lambda1=3.0), 2 * AXES
    first = method.terms(features(apart, AXES[:3], images=AXES, epoch=0), Costs(0.1, 0.001, 20))
    assert list(first) == NAMES
    # three references at right angles, the fourth stamped image at right angles to all of them
    assert first["effectiveness (L0)"].item() == 0.0
    assert first["spread (L3)"].item() == pytest.approx(0.5 * 0.5)
    later = method.terms(features(apart, AXES[:3], views=AXES[1:2], epoch=9), Costs(0.1, 0.001, 20))
    assert later["effectiveness (L0)"].item() == pytest.approx(1 / 4)
    assert later["reference (L1)"].item() == pytest.approx(3.0)
    assert later["collapse (S)"].item() == pytest.approx(0.0)
    assert later["distance (W)"].item() > 0


def test_a_run_reports_where_the_costs_ended() -> None:
    method = DRUPE(epochs=2, batch_size=8, trigger_size=3, reference_views=2)
    done = method.plant(clean_encoder(), shadow(), references(1, 1, 1), run=Run(rng=Rng(0)))
    assert (done.evidence["c"], done.evidence["c1"]) == (0.1, 0.001)
    assert set(NAMES) < set(done.history)


def test_misuse() -> None:
    run = Run(rng=Rng(0))
    with pytest.raises(ImageError, match="needs at least one reference image"):
        DRUPE().plant(clean_encoder(), shadow(), [], run=run)
    with pytest.raises(ImageError, match="does not fit"):
        DRUPE().plant(clean_encoder(), shadow(), references(1), run=run)
    with pytest.raises(SettingError, match="Setting 'directions' of attack 'drupe' cannot be 0"):
        DRUPE(directions=0)
