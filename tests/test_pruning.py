"""Hidden channels: found where they are, measured by hand, taken out for good."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from encoderguard.defenses.fine_pruning import without_least_active
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError, SettingError
from encoderguard.hidden import Units, edited, hidden_units, last_stage_units
from encoderguard.images import ImageSet
from encoderguard.pruning import bake, channel_activations, masked
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.triggers import Patch
from tests.toy_networks import toy_transformer

RUN = Run(rng=Rng(0), precision="float32")


def resnet(name: str = "resnet18", width: int = 2, stem: str = "cifar") -> Encoder:
    spec = EncoderSpec(architecture=f"encoderguard:{name}", width=width, stem=stem)  # type: ignore[arg-type]
    encoder = Encoder.build(spec, Rng(0))
    with torch.no_grad():
        for part in encoder.modules():  # as after training: scales and shifts that do not hide a mistake
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5, generator=Rng(1).generator())
                part.bias.uniform_(-0.5, 0.5, generator=Rng(2).generator())
                assert part.running_mean is not None
                part.running_mean.uniform_(-0.2, 0.2, generator=Rng(3).generator())
    return encoder.eval()


def chain(*middle: nn.Module) -> Encoder:
    """1 x 1 convolutions by hand: channel 0 is red, 1 is green, 2 is minus blue."""
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, -1.0])).view(3, 3, 1, 1))
        nn.init.zeros_(first.bias)  # type: ignore[arg-type]
    module = nn.Sequential(first, *(middle or (nn.ReLU(inplace=True),)), second)
    return Encoder.wrap(module, taps=["0"]).eval()


def colours(*values: tuple[int, int, int]) -> ImageSet:
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 3, 1, 1).expand(-1, 3, 4, 4)
    return ImageSet.from_arrays(pixels.contiguous(), name="colours")


def batch(side: int = 8) -> Tensor:
    return torch.rand(4, 3, side, side, generator=Rng(5).generator())


def test_the_hidden_channels_of_resnets() -> None:
    found = hidden_units(resnet())
    assert len(found) == 8
    assert found[0] == Units("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", 2, channels_first=True)
    last = last_stage_units(resnet())
    assert [(units.producer, units.count) for units in last] == [
        ("layer4.0.conv1", 16),
        ("layer4.1.conv1", 16),
    ]
    deep = last_stage_units(resnet("resnet50"))
    assert [(units.norm, units.consumer) for units in deep[:2]] == [
        ("layer4.0.bn1", "layer4.0.conv2"),
        ("layer4.0.bn2", "layer4.0.conv3"),
    ]
    assert len(deep) == 6


def test_the_hidden_channels_of_a_transformer_are_those_of_its_mlps() -> None:
    encoder = toy_transformer()
    assert [units.producer for units in hidden_units(encoder)] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert last_stage_units(encoder) == hidden_units(encoder)  # one per block: the last two blocks count


def test_an_activation_that_does_not_keep_zero_hides_nothing_that_could_be_taken_out() -> None:
    assert len(hidden_units(chain())) == 1
    assert hidden_units(chain(nn.Sigmoid())) == []
    with pytest.raises(EncoderError, match="has no hidden channels that could be taken out"):
        last_stage_units(chain(nn.Sigmoid()))


class Gated(nn.Module):
    """A squeeze-and-excitation gate: every channel is scaled by what all of them say."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(4, 4, 1)
        self.expand = nn.Conv2d(4, 4, 1)

    def forward(self, channels: Tensor) -> Tensor:
        scale: Tensor = self.expand(self.reduce(channels.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return channels * scale


def test_channels_that_a_gate_reads_are_not_hidden_but_those_inside_it_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 2, 1), nn.Flatten())
    assert [units.producer for units in hidden_units(Encoder.wrap(network, taps=["3"]))] == ["0"]
    network[2] = Gated()
    nn.init.ones_(network.get_submodule("2.reduce").weight)  # type: ignore[arg-type]
    assert [units.producer for units in hidden_units(Encoder.wrap(network, taps=["3"]))] == ["2.reduce"]


def test_activations_by_hand() -> None:
    encoder = chain()
    (units,) = hidden_units(encoder)
    pictures = colours((255, 0, 255), (51, 0, 0))
    assert channel_activations(encoder, units, pictures, RUN).tolist() == pytest.approx([0.6, 0.0, 0.0])
    largest = channel_activations(encoder, units, pictures, RUN, reduction="max")
    assert largest.tolist() == pytest.approx([1.0, 0.0, 0.0])
    trigger = Patch(size=2, margin=0)  # white on a quarter of the places
    stamped = channel_activations(encoder, units, pictures, RUN, trigger)
    assert stamped.tolist() == pytest.approx([0.75 * 0.6 + 0.25, 0.25, 0.0])
    assert not encoder.backbone.get_submodule(units.consumer)._forward_pre_hooks


def test_the_least_active_go_first() -> None:
    active = torch.tensor([0.3, 0.1, 0.4, 0.2])
    assert without_least_active(active, 0.0).tolist() == [True] * 4
    assert without_least_active(active, 0.49).tolist() == [True, False, True, True]
    assert without_least_active(active, 0.5).tolist() == [True, False, True, False]
    assert without_least_active(active, 1.0).tolist() == [False, False, True, False]
    assert without_least_active(torch.zeros(100), 0.29).sum() == 71  # .29 * 100 is a little less than 29


def test_a_mask_holds_for_its_context_and_lets_gradients_through() -> None:
    encoder = chain()
    (units,) = hidden_units(encoder)
    images = batch(4)
    whole = encoder(images)
    mask = torch.tensor([0.0, 1.0, 1.0], requires_grad=True)
    with masked(encoder, units, mask):
        without = encoder(images)
    assert torch.equal(encoder(images), whole)
    second = encoder.backbone.state_dict()["2.weight"]
    red = images[:, 0].mean((1, 2))
    assert torch.allclose(whole - without, red[:, None] * second[:, 0].view(1, 2), atol=1e-6)
    without.sum().backward()
    assert mask.grad is not None
    assert float(mask.grad[0]) == pytest.approx(float(red.sum() * second[:, 0].sum()), rel=1e-4)


def test_edits_before_and_after_the_activation() -> None:
    encoder = chain()
    (units,) = hidden_units(encoder)
    images = batch(4)
    with edited(encoder, units, lambda channels: -channels, before_activation=True):
        early = channel_means(encoder, units, images)
    with edited(encoder, units, lambda channels: -channels):
        late = channel_means(encoder, units, images)
    red, green, blue = images.mean((0, 2, 3)).tolist()
    assert early == pytest.approx([0.0, 0.0, blue])
    assert late == pytest.approx([-red, -green, 0.0])


def channel_means(encoder: Encoder, units: Units, images: Tensor) -> list[float]:
    seen: list[Tensor] = []

    def watch(channels: Tensor) -> Tensor:
        seen.append(channels.detach().mean((0, 2, 3)))
        return channels

    with edited(encoder, units, watch):
        encoder(images)
    return [float(value) for value in seen[0]]


@pytest.mark.parametrize("kind", ["resnet18", "resnet50", "transformer", "group norm"])
def test_a_baked_mask_is_in_the_weights(kind: str) -> None:
    if kind == "transformer":
        encoder = toy_transformer()
    elif kind == "group norm":
        encoder = chain(nn.GroupNorm(1, 3), nn.GELU())
    else:
        encoder = resnet(kind)
    before, images = encoder.fingerprint, batch()
    baked = encoder
    for units in last_stage_units(encoder):
        mask = torch.arange(units.count) % 3 != 1
        with masked(baked, units, mask):
            expected = baked(images)
        assert not torch.allclose(expected, baked(images), atol=1e-4)
        baked = bake(baked, units, mask)
        assert torch.allclose(baked(images), expected, atol=1e-5)
    assert encoder.fingerprint == before


def test_a_baked_mask_survives_the_file_and_torchvision(tmp_path: Path) -> None:
    encoder = resnet(width=64, stem="imagenet")
    units = last_stage_units(encoder)[0]
    mask = torch.arange(units.count) % 2 == 0
    pruned = bake(encoder, units, mask).eval()
    images = batch(32)
    loaded = Encoder.load(pruned.save(tmp_path / "pruned.safetensors"))
    assert torch.equal(loaded(images), pruned(images))
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(loaded.backbone.state_dict())
    assert torch.allclose(theirs.eval()(images), pruned(images), atol=1e-4)
    block = theirs.layer4[0]
    assert not block.conv1.weight[1::2].any()
    assert not block.bn1.weight[1::2].any()
    assert not block.bn1.bias[1::2].any()
    assert block.conv1.weight[::2].any()


def test_masks_that_do_not_fit_are_refused() -> None:
    encoder = resnet()
    units = last_stage_units(encoder)[0]
    with pytest.raises(
        SettingError, match=r"The mask of layer4.0.conv1 needs 16 values, found shape \[3\]\."
    ):
        bake(encoder, units, torch.ones(3, dtype=torch.bool))
    with pytest.raises(
        SettingError, match=r"Only a bool mask can be baked into weights, found torch\.float32"
    ):
        bake(encoder, units, torch.ones(16))
    with pytest.raises(SettingError, match="needs 16 values"), masked(encoder, units, torch.ones(2)):
        pass
