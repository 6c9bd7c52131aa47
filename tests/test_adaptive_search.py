"""The attacker who adapts to the trigger search: the term, its scale, its gradient and its effect."""

import pytest
import torch

from encoderguard.attacks.adaptive_search import AdaptiveSearch, centred_collapse, centred_displacement
from encoderguard.collapse import Collapse
from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.run import Run
from tests.attack_toys import AXES, clean_encoder, features, references, shadow

# Two clean images with mean (5, 1) and standard deviations (1, 1).
CLEAN = torch.tensor([[4.0, 0.0], [6.0, 2.0]])


def test_the_term_is_the_weighted_collapse_after_centring() -> None:
    # (8, 1) and (5, 4) are (3, 0) and (0, 3) from the mean: cosine 0, where raw ones have .81
    step = features(torch.tensor([[8.0, 1.0], [5.0, 4.0]]), CLEAN[:1], images=CLEAN, images_clean=CLEAN)
    assert centred_collapse(step).item() == pytest.approx(0, abs=1e-6)
    same = features(torch.tensor([[8.0, 1.0], [6.0, 1.0]]), CLEAN[:1], images=CLEAN, images_clean=CLEAN)
    terms = AdaptiveSearch(alpha=3.0).terms(same, None)
    assert list(terms) == ["effectiveness (L0)", "reference (L1)", "utility (L2)", "collapse"]
    assert terms["collapse"].item() == pytest.approx(3)


def test_the_second_term_is_how_far_stamped_images_are_from_their_own_images() -> None:
    # standardised, the clean images are (-1, -1) and (1, 1); the stamped ones (3, 0) and (0, 3)
    step = features(torch.tensor([[8.0, 1.0], [5.0, 4.0]]), CLEAN[:1], images=CLEAN, images_clean=CLEAN)
    assert centred_displacement(step).item() == pytest.approx(1 - (-(0.5**0.5) + 0.5**0.5) / 2, abs=1e-6)
    still = features(CLEAN.clone(), CLEAN[:1], images=CLEAN, images_clean=CLEAN)
    assert centred_displacement(still).item() == pytest.approx(0, abs=1e-6)
    away = features(CLEAN.flip(0), CLEAN[:1], images=CLEAN, images_clean=CLEAN)
    assert AdaptiveSearch(gamma=0.5).terms(away, None)["displacement"].item() == pytest.approx(1)


def test_several_triggers_count_equally() -> None:
    apart, alike = torch.tensor([[8.0, 1.0], [5.0, 4.0]]), torch.tensor([[8.0, 1.0], [6.0, 1.0]])
    step = features([apart, alike], [CLEAN[:1], CLEAN[:1]], images=CLEAN, images_clean=CLEAN)
    assert centred_collapse(step).item() == pytest.approx(0.5)


def test_the_clean_side_gets_no_gradient() -> None:
    clean, triggered = AXES.clone().requires_grad_(), AXES.flip(0).clone().requires_grad_()
    torch.autograd.backward(centred_collapse(features(triggered, AXES[:1], images=clean)))
    assert clean.grad is None
    assert triggered.grad is not None
    assert bool((triggered.grad != 0).any())


@pytest.mark.parametrize("term", ["collapse", "displacement"])
def test_minimising_it_lowers_what_the_detector_measures(term: str) -> None:
    found = {}
    for weight in (0.0, 5.0):
        method = AdaptiveSearch(
            epochs=15,
            batch_size=16,
            optimizer="adam",
            lr=3e-3,
            trigger_size=4,
            alpha=weight if term == "collapse" else 0.0,
            gamma=weight if term == "displacement" else 0.0,
            reference_views=2,
        )
        run = Run(rng=Rng(0), precision="float32")
        done = method.plant(clean_encoder(), shadow(32), references(1), run=run)
        told = Collapse(done.encoder, shadow(32), run=run, exact=True).measure([done.trigger])[0]
        found[weight] = getattr(told, term)
    assert found[5.0] < found[0.0] - 0.05


def test_misuse() -> None:
    with pytest.raises(SettingError, match="Setting 'alpha' of attack 'adaptive_search' cannot be -1"):
        AdaptiveSearch(alpha=-1)
    with pytest.raises(ImageError, match="A 10-pixel patch with margin 1 does not fit into 8 x 8 images"):
        AdaptiveSearch().plant(clean_encoder(), shadow(), references(1), run=Run(rng=Rng(0)))
