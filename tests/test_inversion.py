"""The trigger-inversion engine, its lambda rule, and the faster copy of the encoder that it searches on."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from encoderguard import folding
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import ImageError, NonFiniteError
from encoderguard.folding import fast_frozen
from encoderguard.images import ImageSet
from encoderguard.inversion import SearchPlan, invert
from encoderguard.penalty import LambdaController, LambdaRule
from encoderguard.random import Rng
from encoderguard.run import Run, Stopped

RUN = Run(rng=Rng(0), precision="float32")


class Brightness(nn.Module):
    """One feature: how bright the upper left 4 x 4 pixels are. Its gradient says where a trigger pays."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        corner: Tensor = self.pool(x[..., :4, :4])
        return corner.mean((1, 2, 3))[:, None]


def dark(features: Tensor) -> Tensor:
    """-1 where all stamped images are white at the place, 0 where they are black."""
    return -features.mean((1, 2))


def toy() -> Encoder:
    return Encoder.wrap(Brightness(), taps=("pool",))


def images(count: int = 16, side: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return ImageSet.from_arrays(pixels.to(torch.uint8))


PLAN = SearchPlan(goal=-0.95, restarts=3, batch_sizes=((0, 8),), max_steps=200)


def test_the_place_that_matters_is_found() -> None:
    found = invert(toy(), images(), dark, PLAN, run=RUN)
    best = min((kept[0] for kept in found.candidates), key=lambda c: c.size)
    inside, outside = best.trigger.mask[:4, :4], best.trigger.mask.clone()
    outside[:4, :4] = 0
    assert inside.mean() > 0.8
    assert outside.max() < 0.3
    assert best.trigger.pattern[:, :4, :4].mean() > 0.9
    assert best.loss < PLAN.goal


def test_candidates_run_from_small_to_large_and_are_spaced() -> None:
    found = invert(toy(), images(), dark, PLAN, run=RUN)
    for r, kept in enumerate(found.candidates):
        sizes = [c.size for c in kept]
        assert sizes == sorted(sizes)
        assert all(c.restart == r and c.loss < PLAN.goal for c in kept)
        assert all(a <= PLAN.spacing * b for a, b in pairwise(sizes[1:]))
        assert sizes[0] == pytest.approx(float(kept[0].trigger.mask.mean()))


def test_restarts_are_independent() -> None:
    short = replace(PLAN, max_steps=12)
    together = invert(toy(), images(), dark, short, run=RUN)
    alone = invert(toy(), images(), dark, replace(short, restarts=1), run=RUN)
    assert together.history["loss/0"] == pytest.approx(alone.history["loss/0"], abs=1e-5)
    assert together.history["loss/0"] != pytest.approx(together.history["loss/1"], abs=1e-5)


def test_the_same_seed_gives_the_same_search_and_leaves_the_encoder_alone() -> None:
    encoder = toy().train()
    first, second = (invert(encoder, images(), dark, PLAN, run=RUN) for _ in range(2))
    other = invert(encoder, images(), dark, PLAN, run=Run(rng=Rng(1), precision="float32"))
    assert first.history == second.history
    assert first.history != other.history
    assert encoder.training


def test_rungs_drop_the_worse_half_and_a_budget_ends_the_rest() -> None:
    plan = replace(PLAN, goal=-2.0, restarts=4, rungs=(4, 8), round_steps=4, max_steps=12)
    found = invert(toy(), images(), dark, plan, run=RUN)
    assert sorted(found.steps) == [4, 4, 8, 12]
    assert sorted(found.outcomes) == ["budget", "dropped", "dropped", "dropped"]
    assert found.image_passes == 8 * (4 * 4 + 2 * 4 + 1 * 4)
    assert found.candidates == ((), (), (), ())


def test_batches_may_grow_and_nobody_converges_before() -> None:
    plan = replace(PLAN, batch_sizes=((0, 2), (40, 16)), round_steps=4, stale_steps=0, least_gain=1.0)
    found = invert(toy(), images(), dark, plan, run=RUN)
    assert set(found.outcomes) == {"converged"}
    assert min(found.steps) > 40


def test_a_time_budget_returns_the_best_so_far() -> None:
    found = invert(toy(), images(), dark, replace(PLAN, seconds=0.0, round_steps=1), run=RUN)
    assert found.steps == (1, 1, 1)
    assert set(found.outcomes) == {"budget"}


def test_progress_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    run = replace(RUN, progress=lambda task, done, total, note="": told.append((done, total, note)))
    invert(toy(), images(), dark, replace(PLAN, max_steps=4), run=run)
    assert told == [(2, 4, "mask 1.0000, 3 running"), (4, 4, "mask 1.0000, 3 running")]


def test_a_stop_is_obeyed() -> None:
    run = replace(RUN)
    run.stop.requested = True
    try:
        with pytest.raises(Stopped):
            invert(toy(), images(), dark, PLAN, run=run)
    finally:
        run.stop.requested = False


def test_misuse_is_named() -> None:
    with pytest.raises(ImageError, match=r"The trigger search needs at least 2 images, but .* holds 1"):
        invert(toy(), images(1), dark, PLAN, run=RUN)
    with pytest.raises(NonFiniteError, match="NaN or infinite at step 0"):
        invert(toy(), images(), lambda features: dark(features) * float("nan"), PLAN, run=RUN)


def feed(controller: LambdaController, restart: int, success: bool, times: int) -> None:
    for _ in range(times):
        controller.update(torch.tensor([restart]), torch.tensor([success]))


def test_lambda_moves_after_more_than_five_in_a_row() -> None:
    controller = LambdaController(LambdaRule(), 2)
    feed(controller, 0, True, 5)
    assert controller.value.tolist() == [1e-3, 1e-3]
    feed(controller, 0, True, 1)
    assert controller.value.tolist() == pytest.approx([5e-3, 1e-3])
    feed(controller, 0, True, 5)
    feed(controller, 0, False, 5)
    feed(controller, 0, True, 1)
    assert controller.value.tolist() == pytest.approx([5e-3, 1e-3]), "neither run was long enough"
    feed(controller, 1, False, 6)
    assert controller.value.tolist() == pytest.approx([5e-3, 2e-4])


def test_lambda_stays_in_its_bounds_and_is_reset_when_it_is_idle() -> None:
    controller = LambdaController(LambdaRule(lowest=1e-4, highest=1e-2), 1)
    feed(controller, 0, True, 60)
    assert controller.value.item() == pytest.approx(2.5e-2), (
        "the last raise may pass the bound, as in the code"
    )
    controller = LambdaController(LambdaRule(lowest=1e-4, patience=20), 1)
    feed(controller, 0, False, 200)
    assert controller.value.item() == pytest.approx(1e-3 / 25)
    feed(controller, 0, True, 11)
    assert controller.value.item() == pytest.approx(1e-3)


def small_resnet() -> Encoder:
    encoder = Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0)).train()
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    with torch.no_grad():
        encoder(torch.rand(8, 3, 32, 32))
    return encoder


def test_folding_changes_no_feature_and_not_the_original() -> None:
    encoder, sample = small_resnet(), torch.rand(4, 3, 32, 32)
    before = encoder.fingerprint
    fast, folded = fast_frozen(encoder, sample, RUN)
    assert folded
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())
    torch.testing.assert_close(fast(sample), encoder.eval()(sample), rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert encoder.fingerprint == before
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_low_precision_stays_close() -> None:
    encoder, sample = small_resnet(), torch.rand(4, 3, 32, 32)
    run = replace(RUN, precision="bf16")
    fast, _ = fast_frozen(encoder, sample, run)
    with run.autocast():
        features = fast(sample)
    assert features.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(features, encoder.eval()(sample))
    assert cosine.min() > 0.999


class Branching(nn.Module):
    """Cannot be traced: its path depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y.mean((2, 3)) if x.sum() > 0 else y.amax((2, 3))


def test_an_untraceable_backbone_is_used_as_it_is() -> None:
    encoder, sample = Encoder.wrap(Branching(), taps=("conv",)), torch.rand(2, 3, 8, 8)
    fast, folded = fast_frozen(encoder, sample, RUN)
    assert not folded
    torch.testing.assert_close(fast(sample), encoder.eval()(sample))


class FixedBatch(nn.Module):
    """Right for the batch that it was made with only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(2, 3)


class AnyBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(x)
        return y.mean((2, 3))


def test_a_folded_copy_that_fixes_the_batch_size_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "_fold", lambda backbone: FixedBatch())
    encoder, sample = Encoder.wrap(AnyBatch(), taps=("pool",)), torch.rand(2, 3, 8, 8)
    assert not fast_frozen(encoder, sample, RUN)[1]


def test_a_folded_copy_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, sample = small_resnet(), torch.rand(2, 3, 32, 32)
    monkeypatch.setattr(folding, "_fold", lambda backbone: small_resnet().backbone.eval())
    fast, folded = fast_frozen(encoder, sample, RUN)
    assert not folded
    torch.testing.assert_close(fast(sample), encoder.eval()(sample))
