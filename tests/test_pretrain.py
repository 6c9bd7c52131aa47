"""Pre-training methods: their maths by hand, what follows what, and that nothing collapses at once."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.models.utils import update_momentum
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from encoderguard import jobs
from encoderguard.augment import AUGMENTATIONS, LIGHT, SIMCLR, gaussian_blur
from encoderguard.captions import CAPTION_TEMPLATES, TextTower, captions_of, tokens
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import ImageError, SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet, load_images
from encoderguard.methods import Pretraining
from encoderguard.monitoring import KNNMonitor
from encoderguard.plans import Plan, optimizer_for
from encoderguard.pretrain import byol, moco
from encoderguard.pretrain.byol import BYOL, byol_loss
from encoderguard.pretrain.clip import CLIP, image_text_loss
from encoderguard.pretrain.moco import MoCo, queue_length, queued_nt_xent
from encoderguard.pretrain.simclr import SimCLR
from encoderguard.pretrain.simsiam import simsiam_loss
from encoderguard.pretrain.supervised import Supervised
from encoderguard.random import Rng
from encoderguard.registry import create
from encoderguard.run import Run
from encoderguard.training import Batch, train

SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"batch_size": 64},
    "moco": {"batch_size": 64, "queue": 128},
    "byol": {"batch_size": 64, "hidden_dim": 64, "projection_dim": 32},
    "simsiam": {"batch_size": 64, "hidden_dim": 64, "predictor_dim": 16},
    "supervised": {"batch_size": 64},
    "clip": {"batch_size": 64, "text_width": 32, "vocabulary": 128},
}


def run(seed: int = 0) -> Run:
    return Run(rng=Rng(seed), precision="float32")


def encoder() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=2), Rng(0)).eval()


def pictures(count: int = 16, *, labelled: bool = True) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=Rng(1).generator(), dtype=torch.uint8)
    labels = torch.arange(count) % 4 if labelled else None
    return ImageSet.from_arrays(
        pixels, labels, ("cat", "dog", "hen", "fox") if labelled else (), name="noise"
    )


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_byol_loss_by_hand() -> None:
    right, up, diagonal = row(2, 0), row(0, 3), row(1, 1)
    # both ways 2 - 2 cos: 2 - 2 * 0 and 2 - 2 / sqrt 2
    assert float(byol_loss((right, diagonal), (up, up))) == pytest.approx(2 + 2 - math.sqrt(2)), (
        "p1, z2; p2, z1"
    )
    assert float(byol_loss((right, up), (up, right))) == pytest.approx(0, abs=1e-6)
    assert float(byol_loss((right, up), (-up, -right))) == pytest.approx(8)


def test_simsiam_loss_by_hand_and_its_stopped_gradient() -> None:
    p1, p2 = row(1, 0).requires_grad_(), row(0, 1).requires_grad_()
    z1, z2 = row(1, 1).requires_grad_(), row(3, 0).requires_grad_()
    loss = simsiam_loss((p1, p2), (z1, z2))
    assert float(loss.detach()) == pytest.approx(-(1 + 1 / math.sqrt(2)) / 2)
    torch.autograd.backward(loss)
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p2.grad is not None
    assert float(p2.grad.abs().sum()) > 0


def test_image_text_loss_by_hand() -> None:
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # logits [[s, s], [0, 0]] with s = 3: rows give log 2 twice, columns log(1 + e^-3) and 3 + log(1 + e^-3)
    columns = (2 * math.log(1 + math.exp(-3)) + 3) / 2
    assert float(image_text_loss(images, texts, 3.0)) == pytest.approx((math.log(2) + columns) / 2)
    assert float(image_text_loss(images, images, 100.0)) == pytest.approx(0, abs=1e-6)


def test_mocos_queue_holds_the_keys_of_the_last_steps() -> None:
    contrast = queued_nt_xent(6, 4, 0.2)
    assert torch.allclose(contrast.memory_bank.bank.norm(dim=1), torch.ones(6))
    generator = Rng(2).generator()
    batches = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    query = torch.randn(3, 4, generator=generator).requires_grad_()
    for keys in batches[:2]:
        contrast(query, keys)
    expected = [nn.functional.normalize(keys, dim=1) for keys in batches]
    assert torch.allclose(contrast.memory_bank.bank, torch.cat(expected[:2]))
    before = contrast.memory_bank.bank.clone()
    found = float(contrast(query, batches[2]).detach())
    unit = nn.functional.normalize(query.detach(), dim=1)
    logits = torch.cat([(unit * expected[2]).sum(1, keepdim=True), unit @ before.T], dim=1) / 0.2
    assert found == pytest.approx(float(-logits.log_softmax(1)[:, 0].mean()), rel=1e-5), (
        "keys in the queue repel"
    )
    assert torch.allclose(contrast.memory_bank.bank, torch.cat([expected[2], expected[1]])), "the oldest goes"
    assert set(contrast.state_dict()) == {"memory_bank.bank", "memory_bank.bank_ptr"}, "a checkpoint keeps it"


@pytest.mark.parametrize(
    ("wanted", "images", "batch", "length"),
    [(65536, 50000, 256, 24832), (4096, 50000, 256, 4096), (65536, 20, 8, 8), (1, 1000, 8, 8)],
)
def test_length_of_the_queue(wanted: int, images: int, batch: int, length: int) -> None:
    assert queue_length(wanted, images, batch) == length


def test_moving_average_by_hand() -> None:
    online, target = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(online.weight, 3.0)
    nn.init.constant_(target.weight, 1.0)
    with torch.no_grad():
        update_momentum(online, target, 0.75)
    assert float(target.weight.detach()) == pytest.approx(0.75 * 1 + 0.25 * 3)


@pytest.mark.parametrize(
    ("module", "method", "momenta"),
    [
        (moco, MoCo(epochs=2, batch_size=8, momentum=0.9), [0.9, 0.9, 0.9, 0.9]),
        (byol, BYOL(epochs=2, batch_size=8, momentum=0.9, hidden_dim=8, projection_dim=4), None),
    ],
)
def test_what_follows_moves_after_every_step(
    module: Any, method: Pretraining, momenta: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def watched(model: nn.Module, follower: nn.Module, m: float) -> None:
        assert not any(parameter.requires_grad for parameter in follower.parameters())
        before = [value.clone() for value in follower.parameters()]
        update_momentum(model, follower, m)
        pairs = zip(before, model.parameters(), follower.parameters(), strict=True)
        for old, own, new in pairs:
            assert torch.allclose(new, m * old + (1 - m) * own.detach(), atol=1e-6)
        seen.append(m)

    monkeypatch.setattr(module, "update_momentum", watched)
    method.train(encoder(), pictures(), run=run())
    rising = [1 - 0.1 * (math.cos(math.pi * step / 3) + 1) / 2 for step in range(4)]
    assert seen == pytest.approx(momenta or rising)


def test_a_fixed_parameter_keeps_its_rate_while_the_others_follow_the_schedule() -> None:
    model = nn.ModuleDict({"body": nn.Linear(192, 4), "head": nn.Linear(4, 1)})
    plan = Plan(epochs=3, batch_size=8, lr=0.5, optimizer="sgd", schedule="cosine")
    groups = optimizer_for(model, plan, list(model["head"].parameters())).param_groups
    assert [len(group["params"]) for group in groups] == [2, 2]
    moved: list[tuple[float, float]] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(batch: Batch) -> dict[str, Tensor]:
        biases: list[Tensor] = [value for name, value in model.named_parameters() if name.endswith("bias")]
        return {"sum": torch.cat(biases).sum() + 0 * batch.images.sum()}

    def watch(step: int, total: int) -> None:
        now = model.state_dict()
        moved.append(tuple(float((before[f"{k}.bias"] - now[f"{k}.bias"])[0]) for k in ("body", "head")))  # type: ignore[arg-type]
        before.update({name: value.clone() for name, value in now.items()})

    images = pictures()
    fixed = list(model["head"].parameters())
    still = replace(plan, momentum=0.0)
    train(model, loss, images, plan=still, run=run(), task="fitting", after_step=watch, fixed=fixed)
    assert [head for _, head in moved] == pytest.approx([0.5] * 6)
    assert [body for body, _ in moved] == pytest.approx([plan.rate(step, 6) for step in range(6)])


def test_warm_up_in_epochs_then_cosine() -> None:
    plan = Plan(epochs=10, batch_size=1, lr=1.0, schedule="warmup_cosine", warmup_epochs=2)
    rates = [plan.rate(step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert plan.text != replace(plan, warmup_epochs=3).text, "a checkpoint of another warm-up is refused"
    assert "warmup" not in Plan(epochs=1, batch_size=1, lr=1.0).text, "older checkpoints stay usable"


def test_ctrls_recipe_has_no_blur_and_its_factor_is_in_the_rates() -> None:
    method = SimCLR(mode="ctrl")
    views = AUGMENTATIONS[method.augmentation]
    assert views.blur == 0
    assert views.crop_scale == (0.2, 1.0)
    factor = 0.5 / 0.07
    # one step of SGD on factor * loss with (.06, 5e-4) and on loss with ours, from weight 2 and gradient 3
    assert method.lr * (3 + method.weight_decay * 2) == pytest.approx(0.06 * (factor * 3 + 5e-4 * 2))
    assert (method.warmup_epochs, method.schedule, method.head) == (10, "warmup_cosine", "plain")
    assert SimCLR().augmentation == "badencoder"
    assert AUGMENTATIONS["badencoder"].blur == 0
    with pytest.raises(SettingError, match="Setting 'mode' of pretrain 'simclr' cannot be 'other'"):
        SimCLR(mode="other")  # type: ignore[arg-type]


def test_blur_is_torchvisions_away_from_the_border_and_keeps_the_mean_of_flat_images() -> None:
    images, sigma = torch.rand(3, 3, 24, 20, generator=Rng(3).generator()), torch.tensor([0.3, 1.0, 1.7])
    found = gaussian_blur(images, sigma)
    for k in range(3):
        expected = torchvision_blur(images[k], [17, 17], [float(sigma[k])] * 2)
        assert torch.allclose(found[k, :, 8:-8, 8:-8], expected[:, 8:-8, 8:-8], atol=1e-5)
    flat = torch.full((3, 3, 8, 8), 0.25)
    assert torch.allclose(gaussian_blur(flat, sigma), flat)


def test_blur_takes_its_share_and_leaves_the_other_draws_alone() -> None:
    images = torch.rand(400, 3, 8, 8, generator=Rng(3).generator())
    plain, blurred = SIMCLR(images, Rng(4).generator()), replace(SIMCLR, blur=0.5)(images, Rng(4).generator())
    same = (plain == blurred).flatten(1).all(1).float().mean()
    assert 0.4 < float(same) < 0.6
    assert float(blurred.min()) >= 0
    assert float(blurred.max()) <= 1


def test_light_views_are_shifts_and_flips() -> None:
    images = torch.rand(64, 3, 8, 8, generator=Rng(3).generator())
    views = LIGHT(images, Rng(4).generator())
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    places = set()
    for image, view in zip(padded, views, strict=True):
        windows = {
            (y, x, flipped): torch.equal(window.flip(-1) if flipped else window, view)
            for y in range(9)
            for x in range(9)
            for flipped in (False, True)
            for window in [image[:, y : y + 8, x : x + 8]]
        }
        assert any(windows.values())
        places.add(next(place for place, fits in windows.items() if fits))
    assert {y for y, _, _ in places} == set(range(9))
    assert {flipped for _, _, flipped in places} == {False, True}
    still = replace(LIGHT, pad=0, flip=0)
    assert torch.equal(still(images, Rng(4).generator()), images)


def test_captions_and_their_tokens() -> None:
    groups = captions_of(pictures(8))
    assert groups[1] == groups[5] == tuple(template.format("dog") for template in CAPTION_TEMPLATES)
    bare = ImageSet.from_arrays(pictures().take(range(3)), [0, 1, 1])
    assert captions_of(bare)[2][0] == "a photo of a class 1"
    own = ImageSet.from_arrays(pictures().take(range(2)), captions=["One, two!", "two"])
    assert captions_of(own) == [("One, two!",), ("two",)]
    rows = tokens(["One, two!", "two", "", "two one two one"], 4096, 3)
    assert rows[0, 1] == rows[1, 0] == rows[3, 0]
    assert rows[0, 0] == rows[3, 1] != rows[1, 0]
    assert rows[:, 1:].tolist()[1:3] == [[0, 0], [0, 0]]
    assert int(rows[:, 0].min()) >= 1
    tower = TextTower(vocabulary=4096, length=3, width=8, layers=1, outputs=5)
    longer = TextTower(vocabulary=4096, length=3, width=8, layers=1, outputs=5)
    longer.load_state_dict(tower.state_dict())
    assert torch.allclose(tower(rows)[1], longer(rows[1:2])[0], atol=1e-5), "the filling does not count"


@pytest.mark.parametrize("name", list(SMALL))
def test_features_have_not_collapsed_after_an_epoch_of_digits(name: str) -> None:
    images = load_images("digits:train", size=16, labels=True)
    images = images.subset(range(256))
    method: Pretraining = create("pretrain", name, SMALL[name] | {"epochs": 1})
    subject = Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0)).eval()
    done = method.train(subject, images, run=run())
    features = nn.functional.normalize(extract(done.encoder, images, run=run()), dim=1)
    assert float(features.std(0).max()) > 1e-3
    assert float((features @ features.T).mean()) < 0.9999
    assert all(math.isfinite(value) for curve in done.history.values() for value in curve)
    assert not done.encoder.training


def test_supervised_learns_and_keeps_its_layer() -> None:
    pixels = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    pixels[32:] = 255
    images = ImageSet.from_arrays(pixels, [0] * 32 + [1] * 32, ("dark", "bright"))
    done = Supervised(epochs=8, batch_size=16, lr=0.02).train(encoder(), images, run=run())
    assert done.head is not None
    assert {name: list(value.shape) for name, value in done.head.items()} == {"weight": [2, 16], "bias": [2]}
    logits = extract(done.encoder, images, run=run()) @ done.head["weight"].T + done.head["bias"]
    assert images.labels is not None
    assert float(logits.argmax(1).eq(images.labels).float().mean()) > 0.95


def test_clip_keeps_a_text_tower_that_can_be_loaded_again() -> None:
    method = CLIP(epochs=1, batch_size=8, text_width=16, text_layers=1, vocabulary=64, projection_dim=8)
    done = method.train(encoder(), pictures(), run=run())
    assert done.head is not None
    tower = TextTower(vocabulary=64, length=16, width=16, layers=1, outputs=8)
    state = {
        name.removeprefix("text."): value for name, value in done.head.items() if name.startswith("text.")
    }
    tower.load_state_dict(state)
    assert list(tower(tokens(["a cat"], 64, 16)).shape) == [1, 8]
    assert list(done.head["project.weight"].shape) == [8, 16]
    assert float(done.head["log_scale"]) == pytest.approx(-math.log(0.07), abs=0.05)


def test_captions_change_what_clip_learns() -> None:
    method = CLIP(
        epochs=1, batch_size=8, text_width=16, text_layers=1
    )  # in a small table the words would meet
    pixels = pictures().take(range(16))
    one, other = (
        ImageSet.from_arrays(pixels, captions=[f"{word} {k}" for k in range(16)]) for word in ("red", "blue")
    )
    assert one.digest != other.digest
    prints = [method.train(encoder(), images, run=run()).encoder.fingerprint for images in (one, other, one)]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("method", [Supervised(batch_size=8), CLIP(batch_size=8)])
def test_methods_that_need_labels_say_so(method: Pretraining) -> None:
    with pytest.raises(ImageError, match=r"noise has (none|neither); give labelled images"):
        method.train(encoder(), pictures(labelled=False), run=run())
    wide = torch.zeros(2, 3, 8, 16, dtype=torch.uint8)
    images = pictures()
    poisoned = ImageSet.from_arrays(images.take(range(16)), images.labels, name="mixed", canvases=wide)
    with pytest.raises(ImageError, match="mixed has 2 appended canvases without"):
        method.train(encoder(), poisoned, run=run())
    single = ImageSet.from_arrays(images.take(range(16)), [0] * 16, ("only",), name="single")
    with pytest.raises(ImageError, match="at least 2 classes, single has 1"):
        Supervised(batch_size=8).train(encoder(), single, run=run())


@pytest.mark.parametrize("name", ["simclr", "moco", "byol", "simsiam"])
def test_canvases_give_views_too(name: str) -> None:
    wide = torch.randint(0, 256, (16, 3, 8, 16), generator=Rng(5).generator(), dtype=torch.uint8)
    images = ImageSet.from_arrays(pictures().take(range(16)), canvases=wide)
    method: Pretraining = create("pretrain", name, SMALL[name] | {"epochs": 1, "batch_size": 8})
    done = method.train(encoder(), images, run=run())
    alone = method.train(encoder(), pictures(labelled=False), run=run())
    assert done.encoder.fingerprint != alone.encoder.fingerprint


@pytest.mark.parametrize("name", ["byol", "supervised"])
def test_a_monitor_measures_and_changes_nothing(name: str) -> None:
    method: Pretraining = create("pretrain", name, SMALL[name] | {"epochs": 4, "batch_size": 8})
    watcher = KNNMonitor(train=pictures(), test=pictures(), run=run(), every=2, k=1)
    notes: list[str] = []

    def listen(task: str, done: int, total: int, note: str = "") -> None:
        notes.append(note)

    plain = method.train(encoder(), pictures(), run=run())
    watched = method.train(encoder(), pictures(), run=replace(run(), progress=listen), monitor=watcher)
    assert watched.encoder.fingerprint == plain.encoder.fingerprint
    assert watched.history.pop("knn") == [1.0, 1.0], "every picture is its own nearest neighbour"
    assert watched.history == plain.history
    assert sum("knn 1.000" in note for note in notes) == 2
    part = watched.encoder.train()
    watcher(part)
    assert part.training
    with pytest.raises(ImageError, match="The kNN monitor needs labels, noise has none"):
        KNNMonitor(train=pictures(), test=pictures(labelled=False), run=run())


def test_the_job_loads_labels_only_where_they_are_needed_and_writes_the_head(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "width": 2,
        "count": 64,
        "image_size": 8,
        "precision": "float32",
        "device": "cpu",
    }
    settings = {"epochs": 1, "batch_size": 32}
    done = jobs.pretrain(
        "digits:train",
        method="supervised",
        settings=settings,
        monitor_train="digits:test",
        monitor_test=load_images("digits:test", size=8, labels=True),
        out=tmp_path / "supervised",
        **options,
    )
    assert done.record.images is not None
    assert done.record.images.labelled
    assert len(done.record.history["knn"]) == 1
    stored = load_file(tmp_path / "supervised" / "head.safetensors")
    assert done.pretrained.head is not None
    assert torch.equal(stored["weight"], done.pretrained.head["weight"])
    assert "head.safetensors" in done.record.outputs
    blind = jobs.pretrain("digits:train", method="moco", settings=settings, **options)
    assert blind.record.images is not None
    assert not blind.record.images.labelled
    with pytest.raises(SettingError, match="needs both --monitor-train and --monitor-test"):
        jobs.pretrain("digits:train", settings=settings, monitor_train="digits:test", **options)


def test_the_job_takes_captions_in_place_of_labels() -> None:
    images = ImageSet.from_arrays(pictures().take(range(16)), captions=[f"number {k}" for k in range(16)])
    settings = {"epochs": 1, "batch_size": 8, "text_width": 16, "vocabulary": 64}
    done = jobs.pretrain(images, method="clip", settings=settings, width=2, precision="float32", device="cpu")
    assert done.record.result_encoder is not None
    assert done.pretrained.head is not None
