"""TransTroj: the bound of its trigger, the search, the two terms."""

import pytest
import torch

from encoderguard.attacks.transtroj import Addition, TransTroj
from encoderguard.errors import ImageError, SettingError
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.triggers import Additive
from tests.attack_toys import clean_encoder, references, shadow

SHORT = TransTroj(epochs=8, trigger_epochs=8, batch_size=16, optimizer="adam", lr=3e-3)


def test_the_pattern_is_bounded_tanh() -> None:
    addition = Addition((2, 2), 10 / 255, Rng(0).generator())
    assert addition.raw.abs().max() <= 1
    with torch.no_grad():
        addition.raw.copy_(torch.tensor([0.0, 0.5, 1e3, -1e3]).view(2, 2).expand(3, 2, 2))
    expected = torch.tensor([[0.0, 10 / 255 * 0.46211716], [10 / 255, -10 / 255]])
    assert torch.allclose(addition.pattern(), expected.expand(3, 2, 2))
    assert torch.equal(addition.trigger().pattern, addition.pattern().detach())


def test_the_trigger_is_faint_and_leads_to_the_reference() -> None:
    run = Run(rng=Rng(0), precision="float32")
    done = SHORT.plant(clean_encoder(), shadow(32), references(1), run=run)
    assert isinstance(done.trigger, Additive)
    assert done.trigger.pattern.abs().max() <= 10 / 255 + 1e-7
    assert done.trigger.pattern.shape == (3, 8, 8)
    seen = done.evidence
    assert seen["cosine_triggered_to_reference"] > seen["cosine_triggered_to_reference_clean_encoder"]
    assert list(done.history) == ["effectiveness", "utility", "loss"]
    assert done.history["loss"][-1] < done.history["loss"][0]


def test_the_search_brings_the_clean_encoder_near_the_reference() -> None:
    short = TransTroj(epochs=1, trigger_epochs=1, trigger_lr=1e-9, batch_size=16, lr=1e-9, bound=0.2)
    long = TransTroj(epochs=1, trigger_epochs=20, batch_size=16, lr=1e-9, bound=0.2)
    cosines = []
    for method in (short, long):
        done = method.plant(clean_encoder(), shadow(32), references(1), run=Run(rng=Rng(0)))
        cosines.append(done.evidence["cosine_triggered_to_reference_clean_encoder"])
    assert cosines[1] > cosines[0]


def test_misuse() -> None:
    run = Run(rng=Rng(0))
    with pytest.raises(ImageError, match="needs at least one reference image"):
        SHORT.plant(clean_encoder(), shadow(), [], run=run)
    with pytest.raises(ImageError, match=r"The reference image is \[3, 16, 16\]"):
        SHORT.plant(clean_encoder(), shadow(), references(1, side=16), run=run)
    with pytest.raises(SettingError, match="Setting 'bound' of attack 'transtroj' cannot be 0"):
        TransTroj(bound=0)
