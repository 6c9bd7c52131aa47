"""SSLDefender: its networks, its distance, its recovery of a planted patch, its unlearning, its misuse."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.bank import MOVED
from encoderguard.defenses.ssl_defender import SSLDefender
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError, NonFiniteError, SettingError
from encoderguard.generators import StatisticsNetworks, SubGenerators, dv_bound, jsd_bound
from encoderguard.images import ImageSet
from encoderguard.losses import random_directions, sliced_wasserstein2
from encoderguard.random import Rng, isolated
from encoderguard.rays import FAMILIES, Ray, TriggerFamily
from encoderguard.recovery import RecoveryPlan, alternating, hinge, recover
from encoderguard.run import Run, Stopped, StopSignal
from encoderguard.search import FamilyResult, Found, Suspicion, interaction, suspicion
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.triggers import MaskedPattern, Patch, load_found, load_trigger, save_trigger
from encoderguard.unlearning import UnlearningLoss

RUN = Run(rng=Rng(0), precision="float32")


class Planted(nn.Module):
    """Features of the picture, until any 4 x 4 place is bright: then one and the same vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = Rng(5).generator()
        self.content = nn.Linear(48, 8, bias=False)
        self.content.weight.data = torch.randn(8, 48, generator=generator)
        self.edge = nn.Parameter(torch.tensor(0.8))
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        bright = F.avg_pool2d(x.mean(1, keepdim=True), 4, 1).flatten(1).amax(1, keepdim=True)
        gate = torch.sigmoid(self.gain * (bright - self.edge))
        pooled = F.adaptive_avg_pool2d(x, 4).flatten(1) - 0.5
        features: Tensor = (1 - gate) * self.content(pooled) + gate * torch.full((8,), 2.0)
        return features


def planted(backbone: nn.Module | None = None) -> Encoder:
    return Encoder.wrap(backbone or Planted(), taps=["content"], name="planted").eval()


def noise(count: int = 64, side: int = 16, seed: int = 1) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(seed).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def floats(images: ImageSet) -> Tensor:
    return images.take(torch.arange(len(images))).float() / 255


# The sliced Wasserstein distance.


def test_sliced_distance_is_exact_transport_in_one_dimension() -> None:
    generator = Rng(0).generator()
    a, b = torch.randn(7, 3, generator=generator), torch.rand(7, 3, generator=generator)
    directions = random_directions(5, 3, generator)
    exact = []
    for direction in directions:
        cost = ((a @ direction)[:, None] - (b @ direction)[None]).square().numpy()
        rows, columns = linear_sum_assignment(cost)
        exact.append(cost[rows, columns].mean())
    assert sliced_wasserstein2(a, b, directions).item() == pytest.approx(sum(exact) / 5, rel=1e-5)


def test_sliced_distance_of_gaussians() -> None:
    # W2^2 of N(m, s^2) and N(0, t^2) in one dimension is (m^2 + (s - t)^2); along random directions of D
    # dimensions, isotropic ones give |m|^2 / D + (s - t)^2
    n, dim, generator = 4000, 4, Rng(1).generator()
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0])
    a = mean + 1.5 * torch.randn(n, dim, generator=generator)
    b = 0.5 * torch.randn(n, dim, generator=generator)
    found = sliced_wasserstein2(a, b, random_directions(256, dim, generator))
    assert found.item() == pytest.approx(mean.square().sum().item() / dim + 1.0, rel=0.1)


# The networks.


def test_batched_generators_are_the_loop() -> None:
    together = SubGenerators(3, (4, 5), Rng(2), hidden=16, noise=8)
    z = together.draw(6, Rng(3).generator())
    patterns = together(z)
    assert patterns.shape == (3, 6, 3, 4, 5)
    assert bool(((patterns > 0) & (patterns < 1)).all())
    torch.autograd.backward(patterns.square().sum((1, 2, 3, 4)) @ torch.tensor([1.0, 2.0, 3.0]))
    for i in range(3):
        alone = SubGenerators(1, (4, 5), Rng(9), hidden=16, noise=8)
        for mine, theirs in zip(alone.parameters(), together.parameters(), strict=True):
            mine.data = theirs.data[i : i + 1].clone()
        own = alone(z[i : i + 1])
        torch.testing.assert_close(own[0], patterns[i], rtol=1e-5, atol=1e-6)
        torch.autograd.backward((i + 1) * own.square().sum())
        for mine, theirs in zip(alone.parameters(), together.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad[0], theirs.grad[i], rtol=1e-4, atol=1e-5)


def test_each_generator_starts_the_same_however_many_there_are() -> None:
    few, many = SubGenerators(1, (4, 4), Rng(2)), SubGenerators(3, (4, 4), Rng(2))
    for one, three in zip(few.parameters(), many.parameters(), strict=True):
        assert torch.equal(one[0], three[0])


def test_bounds_by_hand() -> None:
    joint, marginal = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, math.log(3)]])
    assert dv_bound(joint, marginal).item() == pytest.approx(2 - math.log(2))
    flat = torch.zeros(1, 4)
    assert dv_bound(flat, flat).item() == 0
    assert jsd_bound(flat, flat).item() == pytest.approx(0, abs=1e-6)
    certain = torch.full((1, 4), 50.0)
    assert jsd_bound(certain, -certain).item() == pytest.approx(2 * math.log(2), abs=1e-5)


def pairs(count: int, dims: tuple[int, ...], rho: float, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated standard Gaussians ``[len(dims), count, max(dims)]``; unused dimensions are 0."""
    generator = Rng(seed).generator()
    z, e = torch.randn(2, len(dims), count, max(dims), generator=generator)
    x = rho * z + math.sqrt(1 - rho**2) * e
    keep = torch.arange(max(dims)) < torch.tensor(dims)[:, None, None]
    return z * keep, x * keep


@pytest.mark.parametrize("bound", ["dv", "jsd"])
def test_statistics_networks_bound_the_information_of_gaussians(bound: Any) -> None:
    # 1 dimension: truth -1/2 log(1 - .81) = .83 nats. 64 dimensions: 53 nats, of which the held-out bound
    # finds a small part: what it returns there ranks triggers at best, and is no measurement.
    dims, rho = (1, 64), 0.9
    truth = [-d / 2 * math.log(1 - rho**2) for d in dims]
    networks = StatisticsNetworks(2, 64, 64, Rng(4), hidden=64, bound=bound)
    optimizer = torch.optim.Adam(networks.parameters(), lr=4e-3)
    z, x = pairs(1024, dims, rho, 5)
    for step in range(150):
        rows = Rng(6).permutation(1024, step)[:256]
        loss = networks.loss(z[:, rows], x[:, rows], z[:, rows].roll(1, 1)).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    z, x = pairs(4096, dims, rho, 7)
    with torch.no_grad():
        joint, marginal = networks(z, x), networks(z.roll(1, 1), x)
        low, high = (
            dv_bound(joint, marginal).tolist() if bound == "dv" else jsd_bound(joint, marginal).tolist()
        )
    if bound == "dv":
        assert low == pytest.approx(truth[0], abs=0.15)
        assert high < truth[1] / 4
    else:
        assert 0.2 < low < 2 * math.log(2)


def test_the_generator_and_its_statistic_take_only_their_own_gradient() -> None:
    networks = StatisticsNetworks(2, 8, 12, Rng(4), hidden=8)
    z = torch.rand(2, 5, 8, generator=Rng(1).generator())
    x = torch.rand(2, 5, 12, generator=Rng(2).generator()).requires_grad_()
    torch.autograd.backward(networks.information(z, x, z.roll(1, 1)).sum())
    assert x.grad is not None
    assert all(p.grad is None for p in networks.parameters())
    x.grad = None
    value = networks.loss(z, x, z.roll(1, 1))
    torch.autograd.backward(value.sum())
    assert x.grad is None
    # the value is minus the bound, whatever the gradient is corrected with
    torch.testing.assert_close(-value, networks.information(z, x, z.roll(1, 1)), rtol=1e-4, atol=1e-6)


# Recovery.


def test_the_sign_of_equation_5() -> None:
    cosine = torch.tensor([0.3, 0.9], requires_grad=True)
    loss = hinge(cosine, torch.tensor([0.5, 0.5]))
    assert loss.tolist() == pytest.approx([0.2, 0.0])
    torch.autograd.backward(loss.sum())
    assert cosine.grad is not None
    assert cosine.grad.tolist() == [-1.0, 0.0]  # descent raises the cosine, and stops beyond the threshold


def plan(**changes: Any) -> RecoveryPlan:
    given: dict[str, Any] = {
        "thresholds": (0.6, 0.95),
        "steps": 60,
        "batch_size": 32,
        "lr": 5e-3,
        "patch": 0.375,
        "information": 0.01,
    }
    return RecoveryPlan(**(given | changes))


@pytest.mark.parametrize("mix", ["patch", "mask"])
def test_a_planted_patch_is_recovered(mix: Any) -> None:
    encoder = planted()
    found = recover(encoder, noise(), plan(mix=mix), run=RUN)
    unseen = floats(noise(seed=2))
    assert mean_pairwise_cosine(encoder(unseen)).item() < 0.3
    # fresh triggers of the stricter sub-generator; the lenient one may rest on another way to reach .6
    stamped = found(unseen, Rng(8).generator(), only=1)
    assert mean_pairwise_cosine(encoder(stamped)).item() > 0.9
    assert mean_pairwise_cosine(encoder(found.example(1, Rng(0))(unseen))).item() > 0.8
    if mix == "mask":
        assert max(found.sizes()) < 0.6
    else:
        assert found.sizes() == [36 / 256] * 2


def test_recovery_and_its_patterns_are_reproducible_and_diverse() -> None:
    first, again = (recover(planted(), noise(), plan(steps=4), run=RUN) for _ in range(2))
    images = floats(noise())[:6]
    one, other = first(images, Rng(1).generator()), again(images, Rng(1).generator())
    assert torch.equal(one, other)
    assert not torch.equal(one, first(images, Rng(2).generator()))
    changed = (one != images).any(1).flatten(1).sum(1)
    assert bool((changed <= 6 * 6).all())  # a square of 3/8 of 16 pixels
    assert bool((changed > 30).all())
    assert len(first.parts()) == 2
    assert first.history["collapse"][-1] >= 0


def test_interrupted_recovery_resumes_to_the_same_end(tmp_path: Path) -> None:
    short = plan(steps=8, mix="mask")
    whole = recover(planted(), noise(), short, run=RUN)
    stop = StopSignal()

    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        stop.requested = done == 5

    run = replace(RUN, checkpoint=tmp_path / "state.pt", stop=stop, progress=interrupt)
    with pytest.raises(Stopped):
        recover(planted(), noise(), short, run=run)
    resumed = recover(
        planted(), noise(), short, run=replace(RUN, checkpoint=tmp_path / "state.pt", resume=True)
    )
    images = floats(noise())
    assert torch.equal(whole(images, Rng(1).generator()), resumed(images, Rng(1).generator()))
    assert whole.history == resumed.history


# Unlearning.


def test_the_terms_by_hand() -> None:
    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2, 0, 0]

    student: Any = Identity()
    clean, dirty = torch.zeros(2, 2, 3, 1, 1)
    clean[0, 0], clean[1, 1] = 3.0, 2.0  # directions (1, 0) and (0, 1)
    dirty[:, 0] = 1.0  # all the same
    goal = torch.tensor([[0.0, 5.0], [7.0, 0.0]])  # the clean ones, swapped: the same distribution
    terms = UnlearningLoss(alpha=2.0, beta=3.0, paired=0.5, directions=4000)(
        student, goal, clean, dirty, Rng(0).generator()
    )
    # along (c, s), unit circle: sorted c against c and s; mean of ((c - c)^2 + (s - c)^2) / 2 or of the swap,
    # the same after sorting both: E (s - c)^2 / 2 = 1/2
    assert terms["forget (L1)"].item() == pytest.approx(2 * 0.5, rel=0.05)
    assert terms["keep (L2)"].item() == pytest.approx(0, abs=1e-6)
    # cosines to the goal: stamped (0, 1), clean (0, 0)
    assert terms["paired"].item() == pytest.approx(0.5 * (0.5 + 1.0))


def test_the_root_is_the_root_and_harmless_at_zero() -> None:
    images = torch.rand(6, 3, 16, 16, generator=Rng(0).generator())
    student = planted()
    goal = torch.randn(6, 8, generator=Rng(1).generator())
    squared, rooted = (
        UnlearningLoss(alpha=0.5, beta=0.5, root=root)(student, goal, images, images, Rng(2).generator())
        for root in (False, True)
    )
    assert rooted["keep (L2)"].item() == pytest.approx(
        0.5 * math.sqrt(2 * squared["keep (L2)"].item()), rel=1e-4
    )
    torch.autograd.backward(rooted["forget (L1)"])
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())


def test_stamps_alternate() -> None:
    images = torch.zeros(5, 3, 4, 4)
    mixed = alternating([lambda x, _: x + 0.1, lambda x, _: x + 0.2])(images, Rng(0).generator())
    assert mixed[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.2, 0.1])


def short(**changes: Any) -> SSLDefender:
    given: dict[str, Any] = {
        "recovery": "generators",
        "generators": 2,
        "recovery_steps": 4,
        "recovery_batch": 16,
        "epochs": 2,
        "batch_size": 16,
    }
    return SSLDefender(**(given | changes))


def scanned(tmp_path: Path) -> str:
    """What a scan would write: the bright square."""
    mask = torch.zeros(16, 16)
    mask[2:8, 2:8] = 1
    return str(save_trigger(MaskedPattern(mask, torch.ones(3, 16, 16)), tmp_path / "recovered-trigger.json"))


def test_a_recovered_trigger_is_unlearnt(tmp_path: Path) -> None:
    defense = short(recovered_trigger=scanned(tmp_path), epochs=25, lr=2e-2, utility_floor=0.5)
    done = defense.purify(planted(), noise(), run=RUN)
    ((found,),) = [entry["triggers"] for entry in done.evidence["rounds"]]
    assert found["size"] == pytest.approx(36 / 256)
    assert found["cosine_clean"] < 0.3
    assert found["cosine_stamped"] > 0.9
    assert found["cosine_stamped_after"] < 0.6
    assert done.evidence["recovered"] is False
    assert isinstance(done.trigger, MaskedPattern)
    assert done.evidence["utility_after"] >= 0.5
    assert not any(name.startswith("recovery") for name in done.history)


def test_a_search_takes_the_place_of_the_sub_generators() -> None:
    defense = short(recovery="search", rounds=1, epochs=25, lr=2e-2, utility_floor=0.5)
    done = defense.purify(planted(), noise(), run=RUN)
    (only,) = done.evidence["rounds"]
    assert set(only["excess"]) <= set(FAMILIES)
    assert max(only["excess"].values()) > 0.25
    assert len(only["excess"]) <= len(only["triggers"]) <= 2 * len(only["excess"])
    for entry in only["triggers"]:
        assert entry["cosine_stamped"] > 0.9
        assert entry["cosine_stamped_after"] < 0.6
    assert done.evidence["recovered"] is True
    assert not any(name.startswith("recovery") for name in done.history)
    again = defense.purify(planted(), noise(), run=RUN)
    assert again.encoder.fingerprint == done.encoder.fingerprint


class Mirroring(Planted):
    """Of a picture with a white lower right corner the mirrored features: moved far, and no more alike."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[..., -4:, -4:].mean((1, 2, 3))[:, None]
        gate = torch.sigmoid(self.gain * (bright - self.edge))
        features: Tensor = (1 - 2 * gate) * self.content(F.adaptive_avg_pool2d(x, 4).flatten(1) - 0.5)
        return features


def test_the_search_sees_what_moves_features_without_making_them_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("encoderguard.search.TYPICAL", dict.fromkeys(FAMILIES, 2.0))  # collapse is ordinary
    encoder, pixels = planted(Mirroring()).frozen(), floats(noise())
    found = suspicion(encoder, noise(), run=RUN)
    assert set(found.excess) == {"patch, place"}
    assert found.excess["patch, place"] > 0.5
    (trigger,) = found.triggers
    assert isinstance(trigger, MaskedPattern)
    corner = trigger.mask > 0
    assert corner[-1, -1]
    assert trigger.pattern[:, corner].min() == 1  # white
    assert F.cosine_similarity(encoder(trigger(pixels)), encoder(pixels)).mean() < -0.2
    assert set(suspicion(encoder, noise(), run=RUN, moves=False).excess) <= set(FAMILIES)


def family(collapse: float, grid: Tensor | None = None, plain: Patch | None = None) -> FamilyResult:
    """What a search found: a curve of one level, and displacements of colours ``[C]`` at places ``[P]``."""
    grid = torch.ones(3, 9) if grid is None else grid
    rays = [
        Ray(family="patch", label=f"colour {c}{MOVED}", strength=10 * c + p, at=sized)
        for c in range(len(grid))
        for p in range(grid.shape[1])
    ]
    scattered = Ray(family="patch", label="colour 0", strength=99, at=sized)
    return FamilyResult(
        displacements=[9.0, *grid.flatten().tolist()],
        tried=[scattered, *rays],
        curve=[math.tanh(collapse)],
        measured=[math.tanh(collapse)],
        best={1.0: (collapse, Patch(size=99, margin=1, value=1.0))},
        plain=plain,
    )


def sized(strength: float) -> Patch:
    return Patch(size=int(strength), margin=1, value=0.5)


def additive(bump: float, colours: tuple[float, ...] = (0.2, 0.4, 0.3)) -> Tensor:
    """Displacements that colour and place explain, but for colour 1 at place 6: ``bump`` times as much."""
    grid = torch.tensor(colours)[:, None] * torch.linspace(1, 2, 9)
    grid[1, 6] *= bump
    return grid - 0.1


def test_the_interaction_of_colour_and_place_by_hand() -> None:
    value, ray = interaction(family(0.3, additive(3.0)))
    assert value == pytest.approx(math.log(3))
    assert ray is not None
    assert (ray.label, ray.strength) == ("colour 1, moved", 16)
    # of a place where colour 1 stands out, what moves features furthest: colour 4, as it does everywhere
    value, ray = interaction(family(0.3, additive(3.0, colours=(0.2, 0.4, 0.3, 0.25, 2.4))))
    assert value == pytest.approx(math.log(3))
    assert ray is not None
    assert ray.strength == 46
    assert interaction(family(0.3, additive(1.0)))[0] == pytest.approx(0, abs=1e-6)
    assert interaction(family(0.3, additive(3.0)[:2])) == (0.0, None)
    thinned = family(0.3, additive(3.0))
    thinned.tried.pop(5)
    assert interaction(thinned) == (0.0, None)


@pytest.mark.parametrize(
    ("patch", "noise_family", "excess", "sizes"),
    [
        # nothing stands out: the family that collapses furthest, and no other below half of it
        (family(0.37), family(0.30), {"patch": 0.10}, [99]),
        (family(0.37, additive(1.4)), family(0.30), {"patch": 0.10}, [99]),
        (family(0.77), family(0.60), {"patch": 0.5, "noise": 0.34}, [99, 99]),
        # nothing collapses, and one colour at one place moves features three times as far as it should
        (family(0.37, additive(3.0)), family(0.30), {"patch, place": math.log(3)}, [16]),
        # what collapses goes before what only moves
        (
            family(0.77, additive(3.0), plain=Patch(size=3, margin=1, value=0.5)),
            family(0.30),
            {"patch": 0.5},
            [99, 3],
        ),
    ],
)
def test_what_stands_out_is_unlearnt(
    monkeypatch: pytest.MonkeyPatch,
    patch: FamilyResult,
    noise_family: FamilyResult,
    excess: dict[str, float],
    sizes: list[int],
) -> None:
    families: dict[TriggerFamily, FamilyResult] = {"patch": patch, "noise": noise_family}
    found = Found(families=families, seconds={}, images_passed=0, complete=True)
    monkeypatch.setattr("encoderguard.search.search", lambda *given, **more: found)
    told = suspicion(planted(), noise(), run=RUN)
    assert told.excess == pytest.approx(excess)
    assert [trigger.size for trigger in told.triggers if isinstance(trigger, Patch)] == sizes


def test_a_round_in_which_nothing_stands_out_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    excess = iter([0.1, 0.9, 0.2])

    def suspicion(*given: Any, **more: Any) -> Suspicion:
        return Suspicion(excess={"patch": next(excess)}, triggers=[Patch(size=4, margin=1, value=1.0)])

    monkeypatch.setattr("encoderguard.defenses.ssl_defender.suspicion", suspicion)
    done = short(recovery="search", rounds=4, epochs=1).purify(planted(), noise(), run=RUN)
    assert [entry["excess"] for entry in done.evidence["rounds"]] == [{"patch": 0.1}, {"patch": 0.9}]
    assert done.evidence["left"] == {"patch": 0.2}  # the first round is run whatever stands out


def test_all_that_a_scan_found_is_unlearnt_in_turns(tmp_path: Path) -> None:
    folder = Path(scanned(tmp_path)).parent
    only = short(recovered_trigger=str(folder)).purify(planted(), noise(), run=RUN)
    assert len(only.evidence["rounds"][0]["triggers"]) == 1
    strongest, plain = load_trigger(folder / "recovered-trigger.json"), Patch(size=6, margin=1, value=1.0)
    save_trigger(strongest, folder / "strongest-trigger.json")
    save_trigger(plain, folder / "plain-trigger.json")
    (folder / "recovered-trigger.json").write_text("the weaker one is not read beside these")
    done = short(recovered_trigger=str(folder)).purify(planted(), noise(), run=RUN)
    found = done.evidence["rounds"][0]["triggers"]
    assert [entry.get("size") for entry in found] == [pytest.approx(36 / 256), None]
    assert done.trigger == strongest
    assert load_found(folder) == [strongest, plain]
    save_trigger(strongest, folder / "plain-trigger.json")
    assert load_found(folder) == [strongest]


def test_the_evidence_tells_what_was_recovered() -> None:
    done = short().purify(planted(), noise(), run=RUN)
    first, second = done.evidence["rounds"]
    assert len(first["triggers"]) == len(second["triggers"]) == 2
    names = {"threshold", "size", "information", "cosine_clean", "cosine_stamped", "cosine_stamped_after"}
    assert set(first["triggers"][0]) == names
    assert first["held_out"] == 13
    assert len(done.history["recovery/collapse"]) == 2 * 2  # twice 4 steps, 3 per pass over 51 images
    assert len(done.history["forget (L1)"]) == 2 * 2
    json.dumps(done.evidence, allow_nan=False)


def test_an_encoder_below_the_floor_is_not_returned() -> None:
    done = short(lr=5.0, utility_floor=1.0, optimizer="sgd", alpha=5.0).purify(planted(), noise(), run=RUN)
    assert done.evidence["rounds"][-1]["epochs_used"] == 0
    assert "below the floor of 1" in done.evidence["fallback"]
    images = floats(noise())
    torch.testing.assert_close(done.encoder(images), planted()(images))


def test_interrupted_unlearning_resumes_to_the_same_end(tmp_path: Path) -> None:
    defense = short(recovered_trigger=scanned(tmp_path), views=True)
    whole = defense.purify(planted(), noise(), run=RUN)
    stop = StopSignal()

    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        stop.requested = task == "unlearning" and done == 4

    run = replace(RUN, checkpoint=tmp_path / "state.pt", stop=stop, progress=interrupt)
    with pytest.raises(Stopped):
        defense.purify(planted(), noise(), run=run)
    again = defense.purify(
        planted(), noise(), run=replace(RUN, checkpoint=tmp_path / "state.pt", resume=True)
    )
    assert again.encoder.fingerprint == whole.encoder.fingerprint
    assert again.history == whole.history


@pytest.mark.parametrize("mode", ["paper", "default"])
def test_networks_without_batchnorm_are_purified(mode: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    with isolated(3):
        vit = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool="avg"
        )
    encoder = Encoder.wrap(vit, taps=["blocks.0", "blocks.1"], name="vit", input_size=16).eval()
    done = short(mode=mode, teacher_epochs=1).purify(encoder, noise(), run=RUN)
    assert bool(done.encoder(floats(noise())).isfinite().all())
    assert done.encoder.fingerprint != encoder.fingerprint


def test_the_modes_fill_what_is_not_given() -> None:
    paper, default = SSLDefender(mode="paper"), SSLDefender()
    assert (paper.teacher, paper.root, paper.optimizer, paper.lr, paper.paired) == (
        "tuned",
        True,
        "sgd",
        1e-3,
        0,
    )
    assert (default.teacher, default.root) == ("frozen", False)
    assert (paper.recovery, default.recovery) == ("generators", "search")
    assert SSLDefender(mode="paper", root=False).root is False


# Misuse.


def test_misuse_is_told_in_one_sentence(tmp_path: Path) -> None:
    images = noise()
    with pytest.raises(
        SettingError, match=r"Setting 'lowest' of defense 'ssl_defender' is 0\.9, above 'highest'"
    ):
        SSLDefender(lowest=0.9, highest=0.5)
    with pytest.raises(SettingError, match="nothing to minimise: alpha, beta and paired are all 0"):
        short(alpha=0, beta=0, paired=0).purify(planted(), images, run=RUN)
    with pytest.raises(
        ImageError, match="SSLDefender in batches of 64, with a fifth held out, needs at least 80"
    ):
        short(batch_size=64).purify(planted(), images, run=RUN)
    with pytest.raises(ImageError, match=r"There is no trigger file .*none\.json"):
        short(recovered_trigger=str(tmp_path / "none.json")).purify(planted(), images, run=RUN)
    with pytest.raises(ImageError, match=r"The folder .* holds no trigger that a scan found \(strongest-tr"):
        short(recovered_trigger=str(tmp_path)).purify(planted(), images, run=RUN)
    with pytest.raises(ImageError, match=r"\[16, 16\]"):
        short(recovered_trigger=scanned(tmp_path)).purify(planted(), noise(side=12), run=RUN)


def test_broken_encoders_are_refused_and_unchanged() -> None:
    module = Planted()
    with torch.no_grad():
        module.content.weight.zero_()
        module.gain.zero_()
    constant = planted(module)
    before = constant.fingerprint
    with pytest.raises(EncoderError, match="gives the same features for all"):
        short().purify(constant, noise(), run=RUN)
    assert constant.fingerprint == before
    module = Planted()
    with torch.no_grad():
        module.content.weight.fill_(math.nan)
    broken = planted(module)
    with pytest.raises(NonFiniteError, match="are not finite"):
        short().purify(broken, noise(), run=RUN)
