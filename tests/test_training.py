"""The training loop and the methods on it: learning, repeating, stopping, resuming."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from encoderguard.attacks.adaptive_decree import AdaptiveDecree
from encoderguard.attacks.adaptive_mimic import AdaptiveMimic
from encoderguard.attacks.badencoder import BadEncoder
from encoderguard.attacks.drupe import DRUPE
from encoderguard.attacks.transtroj import TransTroj
from encoderguard.defenses.finetune import FineTune
from encoderguard.defenses.medic import MEDIC
from encoderguard.defenses.mimic import MIMIC
from encoderguard.defenses.nad import NAD
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError, ImageError, NonFiniteError, SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import History, Pretraining, Reference
from encoderguard.pretrain.simclr import SimCLR
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.run import Run, Stopped
from encoderguard.training import Batch, Plan, train

PLAN = Plan(epochs=3, batch_size=8, lr=0.05)
TASKS = ("pre-training", "planting", "distilling", "fine-tuning", "cloning")


def pictures(count: int = 20, side: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(1).generator(), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, name="noise")


def small_encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(0)).eval()


def linear() -> nn.Linear:
    model = nn.Linear(3 * 8 * 8, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def brightness(model: nn.Module) -> Callable[[Batch], dict[str, Tensor]]:
    def loss(batch: Batch) -> dict[str, Tensor]:
        guess = model(batch.images.flatten(1)).squeeze(1)
        noise = 0.01 * torch.randn(len(guess), generator=batch.rng.generator("noise"))
        return {"square": (guess - batch.images.mean((1, 2, 3)) + noise).square().mean()}

    return loss


def fit(run: Run, model: nn.Module | None = None, plan: Plan = PLAN) -> tuple[nn.Module, History]:
    model = model or linear()
    return model, train(model, brightness(model), pictures(), plan=plan, run=run, task="fitting")


def test_training_learns_and_repeats() -> None:
    model, history = fit(Run(rng=Rng(0), precision="float32"), plan=replace(PLAN, epochs=30, lr=0.002))
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert len(history["loss"]) == 30
    again, repeated = fit(Run(rng=Rng(0), precision="float32"), plan=replace(PLAN, epochs=30, lr=0.002))
    assert repeated == history
    assert torch.equal(model.state_dict()["weight"], again.state_dict()["weight"])


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_stopped_run_resumes_to_the_same_end(tmp_path: Path, stop_at: int) -> None:
    whole, history = fit(Run(rng=Rng(0)))
    run = Run(rng=Rng(0), checkpoint=tmp_path / "checkpoint.pt", resume=True)

    def stop(task: str, done: int, total: int, note: str = "") -> None:
        run.stop.requested = done == stop_at

    with pytest.raises(Stopped):
        fit(replace(run, progress=stop))
    run.stop.requested = False
    resumed, rest = fit(run)
    assert rest == history
    assert torch.equal(whole.state_dict()["weight"], resumed.state_dict()["weight"])


def test_dropout_follows_the_seed_and_survives_a_resume(tmp_path: Path) -> None:
    def fitted(run: Run, outside: int) -> tuple[Tensor, History]:
        model = linear()
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        _, history = fit(run, nn.Sequential(nn.Dropout(0.5), model))
        assert torch.equal(torch.get_rng_state(), state), "training leaves the caller's generator alone"
        return model.weight, history

    whole, history = fitted(Run(rng=Rng(0)), 1)
    run = Run(rng=Rng(0), checkpoint=tmp_path / "checkpoint.pt", resume=True)

    def stop(task: str, done: int, total: int, note: str = "") -> None:
        run.stop.requested = done == 3

    with pytest.raises(Stopped):
        fitted(replace(run, progress=stop), 2)
    run.stop.requested = False
    resumed, rest = fitted(run, 3)
    assert rest == history
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, fitted(Run(rng=Rng(1)), 1)[0])


def test_resuming_with_another_plan_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    run = Run(rng=Rng(0), checkpoint=tmp_path / "checkpoint.pt", resume=True)
    run.stop.requested = True
    with pytest.raises(Stopped):
        fit(run)
    run.stop.requested = False
    with pytest.raises(EncoderError, match="belongs to a run with other settings"):
        fit(run, plan=replace(PLAN, lr=0.1))
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(EncoderError, match="cannot be read"):
        fit(run)


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    model = linear()

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"bad": model(batch.images.flatten(1)).sum() * float("nan")}

    with pytest.raises(NonFiniteError, match="Fitting broke off at step 0: its loss is not finite"):
        train(model, loss, pictures(), plan=PLAN, run=Run(rng=Rng(0)), task="fitting")


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ImageError, match="needs at least 64 images, but noise holds 20"):
        fit(Run(rng=Rng(0)), plan=replace(PLAN, batch_size=64))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_schedules(schedule: str) -> None:
    plan = Plan(epochs=1, batch_size=1, lr=1.0, schedule=schedule)  # type: ignore[arg-type]
    rates = [plan.rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    if schedule == "constant":
        assert min(rates) == 1.0
    else:
        assert rates[-1] < 0.01
        assert rates[0] == (1.0 if schedule == "cosine" else pytest.approx(0.1))


def simclr(run: Run) -> Encoder:
    return SimCLR(epochs=2, batch_size=8).train(small_encoder(), pictures(), run=run).encoder


def pretrainer(name: str, **settings: object) -> Callable[[Run], Encoder]:
    def trained(run: Run) -> Encoder:
        method: Pretraining = create("pretrain", name, {"epochs": 2, "batch_size": 8, **settings})
        images = ImageSet.from_arrays(pictures().take(range(20)), torch.arange(20) % 4)
        return method.train(small_encoder(), images, run=run).encoder

    return trained


PRETRAINERS = [
    pytest.param(pretrainer("moco"), id="moco"),
    pytest.param(pretrainer("byol", hidden_dim=16, projection_dim=8), id="byol"),
    pytest.param(pretrainer("simsiam", hidden_dim=16, predictor_dim=8), id="simsiam"),
    pytest.param(pretrainer("supervised"), id="supervised"),
    pytest.param(pretrainer("clip", text_width=16, vocabulary=64), id="clip"),
    pytest.param(pretrainer("simclr", mode="ctrl", hidden_dim=16), id="ctrl"),
]


def badencoder(run: Run) -> Encoder:
    method = BadEncoder(epochs=2, batch_size=8, trigger_size=3, reference_views=2)
    reference = Reference(image=pictures().take([0])[0])
    return method.plant(small_encoder(), pictures(), [reference], run=run).encoder


def adaptive_decree(run: Run) -> Encoder:
    method = AdaptiveDecree(epochs=2, batch_size=8, trigger_size=3, reference_views=2)
    return method.plant(small_encoder(), pictures(), given(1), run=run).encoder


def adaptive_mimic(run: Run) -> Encoder:
    method = AdaptiveMimic(epochs=2, batch_size=8, trigger_size=3, reference_views=2, critic_hidden=8)
    return method.plant(small_encoder(), pictures(), given(1), run=run).encoder


def drupe(run: Run) -> Encoder:
    # the costs move from the first epoch on, and the main part of the schedule is reached
    method = DRUPE(epochs=6, batch_size=8, trigger_size=3, reference_views=2, adapt_after=0, lr=1e-3)
    return method.plant(small_encoder(), pictures(), given(2), run=run).encoder


def transtroj(run: Run) -> Encoder:
    method = TransTroj(epochs=2, batch_size=8, trigger_epochs=1)
    return method.plant(small_encoder(), pictures(), given(1), run=run).encoder


def given(count: int) -> list[Reference]:
    return [Reference(image=image) for image in pictures().take(range(count))]


def mimic(run: Run) -> Encoder:
    method = MIMIC(epochs=2, batch_size=8)
    return method.purify(small_encoder(), pictures(32), run=run).encoder


def finetune(run: Run) -> Encoder:
    method = FineTune(epochs=2, batch_size=8, warm_up=1, utility_floor=0)
    return method.purify(small_encoder(), pictures(32), run=run).encoder


def nad(run: Run) -> Encoder:
    method = NAD(teacher_epochs=1, epochs=2, batch_size=8, warm_up=1, utility_floor=0)
    return method.purify(small_encoder(), pictures(32), run=run).encoder


def medic(run: Run) -> Encoder:
    method = MEDIC(epochs=2, batch_size=8, warm_up=1)
    return method.purify(small_encoder(), pictures(32), run=run).encoder


ATTACKS = (badencoder, adaptive_decree, adaptive_mimic, drupe, transtroj)
DEFENSES = (mimic, finetune, nad, medic)


@pytest.mark.parametrize("method", [simclr, *ATTACKS, *DEFENSES, *PRETRAINERS])
def test_methods_resume_to_the_same_end(method: Callable[[Run], Encoder], tmp_path: Path) -> None:
    whole = method(Run(rng=Rng(0)))
    run = Run(rng=Rng(0), checkpoint=tmp_path / "checkpoint.pt", resume=True)

    def stop(task: str, done: int, total: int, note: str = "") -> None:
        run.stop.requested = task in TASKS and done == 3

    with pytest.raises(Stopped):
        method(replace(run, progress=stop))
    run.stop.requested = False
    assert method(run).fingerprint == whole.fingerprint


def test_badencoder_freezes_batch_norm_and_pulls_triggered_images_to_the_reference() -> None:
    clean, shadow = small_encoder(), pictures(32)
    reference = Reference(image=shadow.take([0])[0])
    method = BadEncoder(
        epochs=30, batch_size=16, optimizer="adam", lr=3e-3, trigger_size=4, reference_views=2
    )
    planted = method.plant(clean, shadow, [reference], run=Run(rng=Rng(0), precision="float32"))
    for name, value in clean.state_dict().items():
        if "bn" in name or "running" in name or "downsample.1" in name:
            assert torch.equal(planted.encoder.state_dict()[name], value), name
    evidence = planted.evidence
    before = evidence["cosine_triggered_to_reference_clean_encoder"]
    assert evidence["cosine_triggered_to_reference"] > before
    assert planted.history["loss"][-1] < planted.history["loss"][0]


def test_badencoder_refuses_what_cannot_work() -> None:
    run = Run(rng=Rng(0))
    with pytest.raises(ImageError, match="needs at least one reference image"):
        BadEncoder().plant(small_encoder(), pictures(), [], run=run)
    wrong = Reference(image=torch.zeros(3, 16, 16, dtype=torch.uint8))
    with pytest.raises(
        ImageError, match=r"The reference image is \[3, 16, 16\], the shadow images are \[3, 8, 8\]"
    ):
        BadEncoder().plant(small_encoder(), pictures(), [wrong], run=run)


def test_mimic_modes_fill_what_is_not_given() -> None:
    authors = MIMIC(mode="authors", epochs=5)
    assert (authors.epochs, authors.source, authors.reduction, authors.alpha1) == (
        5,
        "student",
        "mean",
        10000.0,
    )
    paper = MIMIC(mode="paper")
    assert (paper.source, paper.weighting, paper.lambda2) == ("teacher", "zscore", 1000.0)
    assert all(value is not None for value in MIMIC().settings().values())
    with pytest.raises(SettingError, match="Setting 'lambda1' of defense 'mimic' cannot be -1"):
        MIMIC(lambda1=-1)
    with pytest.raises(SettingError, match="Setting 'mode' of defense 'mimic' cannot be 'best'"):
        MIMIC(mode="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["authors", "paper", "default"])
def test_mimic_modes_run_and_leave_the_suspect_alone(mode: str) -> None:
    suspect = small_encoder()
    before = suspect.fingerprint
    settings = {"mode": mode, "epochs": 1, "batch_size": 16}
    done = MIMIC(**settings).purify(suspect, pictures(32), run=Run(rng=Rng(0)))  # type: ignore[arg-type]
    assert suspect.fingerprint == before
    assert done.encoder.fingerprint != before
    assert len(done.evidence["beta"]) == 4
    assert [stage["tap"] for stage in done.evidence["profile"]["stages"]] == [
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]
