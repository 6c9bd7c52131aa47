"""The attacker who adapts to DECREE: the term, its sign and its effect."""

import pytest

from encoderguard.attacks.adaptive_decree import AdaptiveDecree
from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.run import Run
from tests.attack_toys import AXES, clean_encoder, features, references, shadow


def test_the_term_is_the_weighted_mean_cosine() -> None:
    step = features(AXES[[0, 0, 1]], AXES[:1])
    terms = AdaptiveDecree(alpha=3.0).terms(step, None)
    assert list(terms) == ["effectiveness (L0)", "reference (L1)", "utility (L2)", "collapse"]
    assert terms["collapse"].item() == pytest.approx(3 * 1 / 3)
    assert terms["effectiveness (L0)"].item() == pytest.approx(1 / 3)


def test_minimising_it_lowers_the_cosine_among_triggered_images() -> None:
    cosines = {}
    for alpha in (0.0, 5.0):
        method = AdaptiveDecree(
            epochs=15,
            batch_size=16,
            optimizer="adam",
            lr=3e-3,
            trigger_size=4,
            alpha=alpha,
            reference_views=2,
        )
        run = Run(rng=Rng(0), precision="float32")
        done = method.plant(clean_encoder(), shadow(32), references(1), run=run)
        cosines[alpha] = done.evidence["cosine_among_triggered"]
    assert cosines[5.0] < cosines[0.0] - 0.01


def test_misuse() -> None:
    with pytest.raises(SettingError, match="Setting 'alpha' of attack 'adaptive_decree' cannot be -1"):
        AdaptiveDecree(alpha=-1)
    with pytest.raises(ImageError, match="A 10-pixel patch with margin 1 does not fit into 8 x 8 images"):
        AdaptiveDecree().plant(clean_encoder(), shadow(), references(1), run=Run(rng=Rng(0)))
