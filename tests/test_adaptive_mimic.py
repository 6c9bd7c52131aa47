"""The attacker who adapts to MIMIC: critics that learn and are kept, the distance of the profiles."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from encoderguard.attacks.adaptive_mimic import AdaptiveMimic, Critics
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError
from encoderguard.mine import donsker_varadhan
from encoderguard.random import Rng
from encoderguard.run import Run
from tests.attack_toys import clean_encoder, features, references, shadow


def critics(sides: int = 2) -> Critics:
    return Critics([3, 2], 4, sides=sides, hidden=16, lr=1e-2, rng=Rng(0), device=torch.device("cpu"))


def inputs(seed: int = 0, sides: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = Rng(seed).generator()
    z = torch.randn(32, 4, generator=generator)
    return [(z[:, :width] * 2, z) for _ in range(sides) for width in (3, 2)]


ORDER = Rng(0).permutation(32)


def test_donsker_varadhan_by_hand() -> None:
    joint, marginal = torch.tensor([2.0, 4.0]), torch.log(torch.tensor([1.0, 3.0]))
    assert donsker_varadhan(joint, marginal).item() == pytest.approx(3 - torch.tensor(2.0).log().item())
    assert donsker_varadhan(torch.ones(3), torch.ones(5)).item() == pytest.approx(0.0, abs=1e-6)


def test_critics_learn_to_see_dependence() -> None:
    made = critics()
    before = made.bounds(inputs(), ORDER)
    assert before.shape == (2, 2)
    for step in range(60):
        made.improve(inputs(), Rng(step).permutation(32))
    after = made.bounds(inputs(), ORDER)
    assert bool((after > before + 0.5).all())


def test_the_encoder_gets_a_gradient_and_the_critics_none() -> None:
    made = critics()
    given = [(h.requires_grad_(), z.requires_grad_()) for h, z in inputs()]
    torch.autograd.backward(made.bounds(given, ORDER).sum())
    assert all(h.grad is not None and bool(h.grad.any()) for h, _ in given)
    assert all(weight.grad is None for weights in made.weights for weight in weights)


def test_the_state_of_critics_goes_through_a_checkpoint() -> None:
    first, second = critics(), critics()
    first.improve(inputs(), ORDER)
    second.load_state_dict(first.state_dict())
    for made in (first, second):
        made.improve(inputs(), ORDER)
    assert torch.equal(first.bounds(inputs(), ORDER), second.bounds(inputs(), ORDER))
    assert not list(first.parameters())  # the encoder's optimiser must not move them


def test_the_term_is_the_weighted_distance_of_the_profiles() -> None:
    z = torch.randn(8, 4, generator=Rng(1).generator())
    stages, constant = (z[:, :3], z[:, :2]), torch.ones(8, 4)
    step = replace(
        features(constant, constant[:1], images=z, images_clean=z),
        images_stages=stages,
        triggered_stages=((torch.ones(8, 3), torch.ones(8, 2)),),
    )
    made = critics()
    for _ in range(20):
        made.improve([(h, z) for h in stages] * 2, Rng(0).permutation(8))
    term = AdaptiveMimic(lambda_mi=2.0).terms(step, made)["information"]
    # triggered images are all the same: a critic sees nothing in them, whatever its weights
    assert made.last[1].abs().max() < 1e-5
    assert term.item() == pytest.approx(2 * made.last[0].abs().sum().item(), abs=1e-4)
    assert term.item() > 0.1


def test_a_run_reports_both_profiles() -> None:
    method = AdaptiveMimic(epochs=1, batch_size=8, trigger_size=3, reference_views=2, critic_hidden=8)
    done = method.plant(clean_encoder(), shadow(), references(1), run=Run(rng=Rng(0)))
    assert len(done.evidence["information_clean"]) == 4
    assert [len(row) for row in done.evidence["information_triggered"]] == [4]
    assert "information" in done.history


def test_misuse() -> None:
    run = Run(rng=Rng(0))
    flat = Encoder.wrap(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), taps=())
    with pytest.raises(EncoderError, match="adaptive_mimic needs an encoder with stages"):
        AdaptiveMimic(trigger_size=3).plant(flat, shadow(), references(1), run=run)
    with pytest.raises(ImageError, match="needs at least one reference image"):
        AdaptiveMimic().plant(clean_encoder(), shadow(), [], run=run)
