import pytest
import torch
from torch import Tensor, nn

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import NonFiniteError
from encoderguard.features import extract, extract_stages
from encoderguard.images import ImageSet
from encoderguard.random import Rng
from encoderguard.run import Run, Stopped, StopSignal
from encoderguard.triggers import ColourPatch, FreshNoise, Patch, Trigger

RUN = Run(rng=Rng(0), precision="float32")


def toy() -> Encoder:
    return Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0))


def noise(n: int, seed: int = 0) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=Rng(seed).generator())
    return ImageSet.from_arrays(pixels, name="noise")


class Colour(nn.Module):
    """The colour of the upper left pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


def red_and_green(n: int = 2) -> ImageSet:
    pixels = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    pixels[::2, 0] = pixels[1::2, 1] = 200
    return ImageSet.from_arrays(pixels, name="colours")


COLOUR = Encoder.wrap(Colour(), taps=[])


def test_features_come_in_order_whatever_the_batch_size_and_modes_are_restored() -> None:
    model, images = toy().train(), noise(7)
    model.backbone.get_submodule("layer1").eval()
    modes = [part.training for part in model.modules()]
    fingerprint = model.fingerprint
    found = extract(model, images, run=RUN, batch_size=3)
    assert [part.training for part in model.modules()] == modes
    assert model.fingerprint == fingerprint
    assert found.dtype == torch.float32
    assert not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(
            found, model.eval()(images.take(range(7)).float() / 255), atol=1e-5, rtol=1e-4
        )


def test_the_trigger_is_stamped_before_the_augmentation() -> None:
    def turn(batch: Tensor) -> Tensor:
        return batch.flip((2, 3))  # the lower right corner, where the trigger is, becomes the upper left one

    corner = Patch(size=2, margin=0)
    red, green, white = [200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [255.0, 255.0, 255.0]
    for trigger, augment, expected in [
        (None, None, [red, green]),
        (None, turn, [red, green]),
        (corner, None, [red, green]),
        (corner, turn, [white, white]),
    ]:
        found = extract(COLOUR, red_and_green(), run=RUN, trigger=trigger, augment=augment)
        torch.testing.assert_close(found * 255, torch.tensor(expected))


class Pixels(nn.Module):
    """All pixels, as features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    "trigger", [ColourPatch(size=2, span=(0, 1)), FreshNoise(), FreshNoise(grey=True)], ids=lambda t: t.title
)
def test_a_trigger_draws_for_every_image_and_alike_for_every_encoder(trigger: Trigger) -> None:
    model, images = Encoder.wrap(Pixels(), taps=[]), red_and_green(20).subset([0] * 20)
    found = extract(model, images, run=RUN, trigger=trigger, batch_size=4)
    # without a generator of its own every batch would repeat the first
    assert not torch.equal(found[:4], found[4:8])
    assert len({tuple(row) for row in found.tolist()}) > 10
    # other batches, another part of the run: the same pictures; another seed: other pictures
    for other in (RUN, RUN.child("clean encoder", 3)):
        assert torch.equal(extract(model, images, run=other, trigger=trigger, batch_size=7), found)
    assert not torch.equal(extract(model, images, run=Run(rng=Rng(1)), trigger=trigger), found)


def test_stages_are_averaged_over_space() -> None:
    model, images = toy().eval(), noise(5)
    features, stages = extract_stages(model, images, run=RUN, batch_size=2)
    torch.testing.assert_close(features, extract(model, images, run=RUN), atol=1e-5, rtol=1e-4)
    assert [tuple(stage.shape) for stage in stages] == [(5, 4), (5, 8), (5, 16), (5, 32)]
    # The features of a resnet are the average of its last map.
    torch.testing.assert_close(stages[-1], features, atol=1e-5, rtol=1e-4)


def test_extraction_shows_progress_and_stops_between_batches() -> None:
    seen: list[tuple[int, int]] = []
    stop = StopSignal()

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        seen.append((done, total))
        stop.requested = True

    with pytest.raises(Stopped):
        extract(COLOUR, red_and_green(3), run=Run(rng=Rng(0), progress=progress, stop=stop), batch_size=2)
    assert seen == [(2, 3)]


def test_features_that_are_not_finite_are_an_error() -> None:
    model = toy()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="features of 3 of 3 images of noise are not finite"):
        extract(model, noise(3), run=RUN)
