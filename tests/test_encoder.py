import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from encoderguard.backbones import ResNet
from encoderguard.bundles import read_provenance
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError
from encoderguard.random import Rng

SPEC = EncoderSpec(architecture="encoderguard:resnet18", width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def encoder(seed: int = 0) -> Encoder:
    return Encoder.build(SPEC, Rng(seed)).eval()


def images(count: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=Rng(seed).generator("images"))


class Small(nn.Module):
    """Averages 2 x 2 patches, then returns what is asked for."""

    def __init__(self, returns: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.out = nn.Identity()
        self.returns = returns

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.returns(self.pool(x)))
        return y


def addresses(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


# --- preprocessing --------------------------------------------------------------------------------


def test_preprocess_resizes_then_normalises_by_hand() -> None:
    model = Encoder.wrap(Small(), taps=[], mean=(0.25, 0.5, 0.0), std=(0.5, 0.25, 1.0), input_size=1)
    image = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 3, 2, 2)  # the mean pixel is 0.5
    assert model.preprocess(image).flatten().tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_images_of_the_right_size_are_not_resampled() -> None:
    model = Encoder.wrap(Small(), taps=[], input_size=16)
    assert torch.equal(model.preprocess(images()), images())


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 8, 8, 3)])
def test_a_batch_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"Expected images of shape \[N, 3, H, W\], found \["):
        encoder()(torch.zeros(shape))


# --- features and stages --------------------------------------------------------------------------


def test_features_and_stages_have_the_documented_shapes() -> None:
    features, stages = encoder().features_and_stages(images())
    assert features.shape == (3, 32)
    assert features.dtype == torch.float32
    assert [tuple(stage.shape) for stage in stages] == [
        (3, 4, 16, 16),
        (3, 8, 8, 8),
        (3, 16, 4, 4),
        (3, 32, 2, 2),
    ]
    assert torch.allclose(stages[-1].mean((2, 3)), features, atol=1e-6)
    assert encoder().feature_dim == 32


def test_stage_hooks_are_gone_after_the_pass_and_after_a_failure() -> None:
    model = encoder()
    model.stages(images())
    with pytest.raises(EncoderError):
        model.stages(torch.zeros(1, 1, 8, 8))
    assert not any(part._forward_hooks for part in model.modules())


def test_a_map_is_averaged_to_features() -> None:
    model = Encoder.wrap(Small(), taps=["pool"])
    features, (stage,) = model.features_and_stages(images())
    assert torch.allclose(features, images().mean((2, 3)))
    assert stage.shape == (3, 3, 8, 8)


def test_tokens_become_a_grid_without_the_class_token() -> None:
    def tokens(x: Tensor) -> Tensor:  # [N, 1 + 64, 3], the first is not a patch
        return torch.cat([torch.full((len(x), 1, 3), 9.0), x.flatten(2).transpose(1, 2)], dim=1)

    model = Encoder.wrap(nn.Sequential(Small(tokens), nn.Flatten()), taps=["0.out"])
    assert torch.allclose(model.stages(images())[0], nn.functional.avg_pool2d(images(), 2))


def test_maps_with_channels_last_are_turned() -> None:
    model = Encoder.wrap(
        nn.Sequential(Small(lambda x: x.permute(0, 2, 3, 1)), nn.Flatten()), taps=["0.out"], tap_layout="NHWC"
    )
    assert torch.allclose(model.stages(images())[0], nn.functional.avg_pool2d(images(), 2))


def test_other_outputs_are_refused() -> None:
    with pytest.raises(EncoderError, match=r"return \[N, D\], found shape \[3, 3, 64\]"):
        Encoder.wrap(Small(lambda x: x.flatten(2)), taps=[])(images())
    with pytest.raises(EncoderError, match=r"has no module 'layer9' to tap; it has: pool, out"):
        Encoder.wrap(Small(), taps=["layer9"])


def test_features_are_finite_and_float32_under_bf16_autocast() -> None:
    model = encoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, stages = model.features_and_stages(images())
    assert features.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in [features, *stages])
    cosine = nn.functional.cosine_similarity(features, model(images()))
    assert cosine.min() > 0.99


# --- copies ---------------------------------------------------------------------------------------


def test_copies_share_nothing_and_leave_the_global_generator_alone() -> None:
    model = encoder()
    state, before = torch.random.get_rng_state(), model.fingerprint
    frozen, clone, fresh = model.frozen(), model.clone(), model.fresh(Rng(1))
    for copy in (frozen, clone, fresh):
        assert not addresses(copy) & addresses(model)
        assert copy.spec == model.spec
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.zero_()
    assert model.fingerprint == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert fresh.training


def test_fresh_weights_depend_on_the_seed_only() -> None:
    same, again, other = (encoder().fresh(Rng(seed)).fingerprint for seed in (1, 1, 2))
    assert same == again
    assert len({same, other, encoder().fingerprint}) == 3


def test_a_wrapped_module_is_reset_for_the_student() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = Encoder.wrap(module, taps=["0"])
    module[1].running_mean.fill_(7)  # type: ignore[operator]
    student = model.fresh(Rng(3))
    assert student.fingerprint == model.fresh(Rng(3)).fingerprint
    assert not torch.equal(student.backbone.get_submodule("0").weight, module[0].weight)  # type: ignore[arg-type]
    assert student.backbone.get_submodule("1").running_mean.eq(0).all()  # type: ignore[operator]


def test_a_wrapped_module_with_an_unreachable_parameter_has_no_student() -> None:
    module = Small()
    module.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(EncoderError, match=r"no reset_parameters reaches \[token\]; give it one"):
        Encoder.wrap(module, taps=[]).fresh(Rng(0))


class Scaled(nn.Module):
    """Resets its own scale, and has a child that nothing resets."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.ParameterDict({"weight": torch.randn(4, 3, 3, 3)})
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.core["weight"]) * self.scale


def frozen_norm() -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(4)
    norm.running_mean.uniform_()
    return norm


@pytest.mark.parametrize(
    ("module", "name"),
    [(Scaled(), "core.weight"), (nn.Sequential(nn.Conv2d(3, 4, 3), frozen_norm()), "1.running_mean")],
)
def test_a_student_never_keeps_what_a_reset_leaves_as_it_was(module: nn.Module, name: str) -> None:
    with pytest.raises(EncoderError, match=rf"no reset_parameters reaches \[{name}\]; give it one"):
        Encoder.wrap(module, taps=[]).fresh(Rng(0))


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_weight_is_reset_for_the_student(parametrize: Any) -> None:
    model = Encoder.wrap(nn.Sequential(parametrize(nn.Conv2d(3, 4, 3, bias=False)), nn.Flatten()), taps=["0"])
    student, images = model.fresh(Rng(3)), torch.rand(2, 3, 8, 8)
    kept = dict(model.named_parameters())
    assert not [name for name, value in student.named_parameters() if torch.equal(value, kept[name])]
    assert torch.equal(student.eval()(images), model.fresh(Rng(3)).eval()(images))


def test_attention_is_reset_for_the_student() -> None:
    module = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8, dropout=0), nn.Flatten())
    model = Encoder.wrap(module, taps=["1"])
    before, after = model.backbone.state_dict(), model.fresh(Rng(0)).backbone.state_dict()
    weights = [name for name, value in before.items() if value.ndim > 1]
    assert "1.self_attn.in_proj_weight" in weights
    assert not [name for name in weights if torch.equal(before[name], after[name])]


def test_asking_for_the_width_of_the_features_leaves_mixed_modes_alone() -> None:
    model = encoder().train()
    model.backbone.get_submodule("bn1").eval()
    assert model.feature_dim == 32
    assert model.backbone.training
    assert not model.backbone.get_submodule("bn1").training


# --- fingerprint and bundles ----------------------------------------------------------------------


def test_the_fingerprint_sees_weights_and_preprocessing_only() -> None:
    model = encoder()
    prints = {model.fingerprint}
    assert model.frozen().fingerprint in prints
    prints.add(Encoder(model.backbone, SPEC.model_copy(update={"input_size": 16})).fingerprint)
    prints.add(Encoder(model.backbone, SPEC.model_copy(update={"mean": (0.5, 0.4, 0.31)})).fingerprint)
    statistics = model.clone()
    statistics.backbone.get_buffer("bn1.running_mean")[0] = 1
    prints.add(statistics.fingerprint)
    weights = model.clone()
    with torch.no_grad():
        weights.backbone.get_parameter("layer4.1.conv2.weight")[0, 0, 0, 0] += 1e-3
    prints.add(weights.fingerprint)
    assert len(prints) == 5


def test_a_bundle_keeps_fingerprint_features_and_provenance(tmp_path: Path) -> None:
    model = encoder()
    path = model.save(tmp_path / "deep" / "e.safetensors", {"seed": 3})
    loaded = Encoder.load(path)
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded(images()), model(images()))
    assert not loaded.training
    assert read_provenance(path) == {"seed": 3}
    assert [file.name for file in path.parent.iterdir()] == ["e.safetensors"]


def test_a_wrapped_bundle_needs_its_module(tmp_path: Path) -> None:
    model = Encoder.wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), taps=["0"], mean=(0.1, 0.2, 0.3))
    path = model.save(tmp_path / "e.safetensors")
    with pytest.raises(EncoderError, match=r"load it from Python with Encoder.load"):
        Encoder.load(path)
    loaded = Encoder.load(path, backbone=nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert loaded.fingerprint == model.fingerprint
    with pytest.raises(
        EncoderError, match=r"'0.weight' should have shape \[4, 3, 5, 5\], found \[4, 3, 3, 3\]"
    ):
        Encoder.load(path, backbone=nn.Sequential(nn.Conv2d(3, 4, 5)))


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(EncoderError, match=r"There is no encoder file"):
        Encoder.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(EncoderError, match=r"is not a readable safetensors file"):
        Encoder.load(path)
    for metadata in (None, {"encoderguard": "[1"}, {"encoderguard": '{"format": "encoderguard.encoder/99"}'}):
        save_file({"a": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(
            EncoderError, match=r"is not an EncoderGuard bundle of format encoderguard.encoder/1"
        ):
            Encoder.load(path)
    header = {
        "format": "encoderguard.encoder/1",
        "spec": {"architecture": "encoderguard:resnet18", "stem": "tiny"},
    }
    save_file({"a": torch.zeros(1)}, path, metadata={"encoderguard": json.dumps(header)})
    with pytest.raises(EncoderError, match=r"The specification in .* is not valid"):
        Encoder.load(path)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model = encoder()
    path = model.save(tmp_path / "e.safetensors")
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("conv1.weight")
    header = {"format": "encoderguard.encoder/1", "spec": SPEC.model_dump(mode="json")}
    save_file(tensors, path, metadata={"encoderguard": json.dumps(header)})
    with pytest.raises(EncoderError, match=r"missing keys \[conv1.weight\], unexpected keys \[extra\]"):
        Encoder.load(path)


# --- other libraries ------------------------------------------------------------------------------


def test_an_exported_encoder_loads_in_torchvision_and_timm(tmp_path: Path) -> None:
    spec = EncoderSpec(architecture="encoderguard:resnet18", width=64, stem="imagenet")
    model = Encoder.build(spec, Rng(0)).eval()
    tensors = load_file(model.save(tmp_path / "e.safetensors"))
    theirs = torchvision.models.resnet18()
    keys = theirs.load_state_dict(tensors, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    theirs.fc = nn.Identity()
    other = timm.create_model("resnet18", pretrained=False, num_classes=0)
    other.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        expected = model(images(size=64))
        for module in (theirs, other):
            assert torch.allclose(module.eval()(images(size=64)), expected, atol=1e-5)


# --- narrow networks on the CPU -------------------------------------------------------------------

TRAINS_NARROW = """
import torch
from torch import nn
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.random import Rng

torch.set_num_threads(1)
narrow = nn.Conv2d(3, 4, 1, 2), nn.ReLU(), nn.Conv2d(4, 8, 1, 2)
wrapped = nn.Sequential(*narrow, nn.AdaptiveAvgPool2d(1), nn.Flatten())
for model in (
    Encoder.build(EncoderSpec(architecture="encoderguard:resnet18", width=4), Rng(0)),
    Encoder.wrap(wrapped, taps=["1"]),
):
    for _ in range(40):
        model(torch.rand(16, 3, 16, 16)).square().mean().backward()
print("survived")
"""


def test_training_a_narrow_network_does_not_corrupt_memory() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINS_NARROW], capture_output=True, text=True, check=False)
    assert done.stdout == "survived\n", done.stderr


def test_the_shortcut_is_a_strided_convolution() -> None:
    shortcut = ResNet("resnet18", width=4).get_submodule("layer2.0.downsample").eval()
    assert isinstance(shortcut, nn.Sequential)
    strided = nn.Conv2d(4, 8, 1, 2, bias=False)
    strided.load_state_dict(shortcut[0].state_dict())
    x = images(size=9).mean(1, keepdim=True).expand(-1, 4, -1, -1)
    torch.testing.assert_close(shortcut(x), nn.Sequential(strided, shortcut[1])(x))
