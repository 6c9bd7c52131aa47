import argparse
import os
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from encoderguard.architectures import build_backbone, describe
from encoderguard.bundles import load_state
from encoderguard.checkpoints import identify, read_tensors
from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError
from encoderguard.loading import NORMALISATIONS, check_encoder, load_encoder, spec_for
from encoderguard.random import Rng, isolated


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=Rng(0).generator("images"))


def small(architecture: str = "resnet18", *, stem: Any = "cifar", width: int = 4) -> Encoder:
    return Encoder.build(
        spec_for(architecture, width, stem, normalisation="cifar10", input_size=32), Rng(7)
    ).eval()


def simclr(encoder: Encoder, prefix: str = "f.f.", *, maxpool: bool = False) -> dict[str, Tensor]:
    """Our weights under the names of the BadEncoder code, with a projector."""
    shift = 4 if maxpool else 3
    positions = {"conv1": 0, "bn1": 1} | {f"layer{i + 1}": shift + i for i in range(4)}
    tensors = {"g.0.weight": torch.zeros(2, 2)} if prefix == "f.f." else {}
    for name, tensor in encoder.backbone.state_dict().items():
        head, _, rest = name.partition(".")
        tensors[f"{prefix}{positions[head]}.{rest}"] = tensor
    return tensors


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "taps", "layout"),
    [
        ("torchvision:resnet50", "layer1 layer2 layer3 layer4", "NCHW"),
        ("torchvision:shufflenet_v2_x1_0", "maxpool stage2 stage3 conv5", "NCHW"),
        ("torchvision:mobilenet_v2", "features.3 features.6 features.13 features", "NCHW"),
        ("torchvision:convnext_tiny", "features.1 features.3 features.5 features", "NCHW"),
        ("torchvision:swin_t", "features.1 features.3 features.5 norm", "NHWC"),
        (
            "torchvision:regnet_y_400mf",
            "trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output",
            "NCHW",
        ),
        (
            "torchvision:vit_b_16",
            " ".join(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)),
            "NCHW",
        ),
        ("timm:resnet18", "layer1 layer2 layer3 layer4", "NCHW"),
        ("timm:mobilenetv3_small_100", "blocks.0 blocks.1 blocks.3 blocks.5", "NCHW"),
        ("timm:convnext_atto", "stages.0 stages.1 stages.2 stages.3", "NCHW"),
        ("timm:swin_tiny_patch4_window7_224", "layers.0 layers.1 layers.2 layers.3", "NHWC"),
        ("timm:vit_tiny_patch16_224", "blocks.2 blocks.5 blocks.8 blocks.11", "NCHW"),
    ],
)
def test_taps_are_the_last_module_of_each_resolution_or_spaced_blocks(
    name: str, taps: str, layout: str
) -> None:
    known = describe(name)
    assert known.taps == tuple(taps.split())
    assert known.tap_layout == layout
    assert known.input_size == 224


@pytest.mark.parametrize(
    ("name", "size", "dim", "maps"),
    [
        ("torchvision:resnet18", 64, 512, [(64, 16), (128, 8), (256, 4), (512, 2)]),
        ("torchvision:shufflenet_v2_x1_0", 64, 1024, [(24, 16), (116, 8), (232, 4), (1024, 2)]),
        ("torchvision:mobilenet_v2", 64, 1280, [(24, 16), (32, 8), (96, 4), (1280, 2)]),
        ("timm:resnet18", 64, 512, [(64, 16), (128, 8), (256, 4), (512, 2)]),
        ("timm:mobilenetv3_small_100", 64, 1024, [(16, 16), (24, 8), (48, 4), (576, 2)]),
        ("timm:convnext_atto", 64, 320, [(40, 16), (80, 8), (160, 4), (320, 2)]),
        ("timm:vit_tiny_patch16_224", None, 192, [(192, 14)] * 4),
        ("timm:swin_tiny_patch4_window7_224", None, 768, [(96, 56), (192, 28), (384, 14), (768, 7)]),
    ],
)
def test_features_and_maps_of_library_models(
    name: str, size: int | None, dim: int, maps: list[tuple[int, int]]
) -> None:
    encoder = load_encoder(name, weights=False, input_size=size)
    with torch.no_grad():
        features, stages = encoder.features_and_stages(images())
    assert features.shape == (2, dim)
    assert [tuple(stage.shape) for stage in stages] == [(2, c, s, s) for c, s in maps]


def test_library_models_take_the_normalisation_of_their_weights() -> None:
    vit = spec_for("timm:vit_tiny_patch16_224")
    assert (vit.mean, vit.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    swin = spec_for("torchvision:swin_t")
    assert (swin.mean, swin.std) == NORMALISATIONS["imagenet"]


def test_library_models_can_be_rebuilt_from_a_bundle_and_afresh(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name in ("timm:mobilenetv3_small_050", "torchvision:shufflenet_v2_x0_5"):
        encoder = load_encoder(name, weights=False, input_size=32)
        loaded = load_encoder(str(encoder.save(tmp_path / "e.safetensors")))
        assert loaded.fingerprint == encoder.fingerprint
        fresh = loaded.fresh(Rng(1))
        assert fresh.spec == encoder.spec
        assert fresh.fingerprint != encoder.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", "no model 'resnet19' in timm; did you mean resnet18"),
        ("timm:resnet18.no_such_tag", "timm cannot build 'resnet18.no_such_tag'"),
        ("torchvision:vit_b_17", "no model 'vit_b_17' in torchvision; did you mean vit_b_16"),
        ("torchvision:googlenet", "has auxiliary classifiers; load it with Encoder.wrap"),
        ("torchvision:squeezenet1_0", "has no linear classifier; load it with Encoder.wrap"),
        ("encoderguard:resnet9", "no model 'resnet9' in encoderguard; did you mean"),
        ("resnet19", "Unknown architecture 'resnet19'; expected encoderguard:resnet18"),
    ],
)
def test_unknown_architectures_are_refused(name: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        spec_for(name)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(EncoderError, match=r"Unknown normalisation 'cifar'; expected cifar10, stl10"):
        spec_for("resnet18", normalisation="cifar")
    with pytest.raises(EncoderError, match=r"Expected std > 0"):
        spec_for("resnet18", std=(1, 0, 1))
    with pytest.raises(EncoderError, match=r"Impossible mean"):
        spec_for("resnet18", mean=(1, 0))
    with pytest.raises(EncoderError, match=r"width of an encoder should be at least 1, found 0"):
        spec_for("resnet18", 0)
    with pytest.raises(EncoderError, match=r"does not accept images of 32 px; leave input_size at 224"):
        load_encoder("timm:vit_tiny_patch16_224", weights=False, input_size=32)


# --- hubs and their local files -------------------------------------------------------------------


def test_timm_weights_come_without_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    create = timm.create_model

    def hub(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        asked.update(options, name=name, pretrained=pretrained)
        return create(name, pretrained=False, **options)

    describe("timm:mobilenetv3_small_050")
    monkeypatch.setattr(timm, "create_model", hub)
    encoder = load_encoder("timm:mobilenetv3_small_050", input_size=32)
    assert asked == {"name": "mobilenetv3_small_050", "pretrained": True, "num_classes": 0}
    assert encoder.feature_dim == 1024
    assert not encoder.training


def test_torchvision_weights_come_as_tensors_and_without_the_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with isolated(3):
        theirs = torchvision.models.shufflenet_v2_x0_5().eval()
    asked: dict[str, Any] = {}

    def hub(url: str, **options: Any) -> dict[str, Tensor]:
        asked.update(options)
        return dict(theirs.state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", hub)
    encoder = load_encoder("torchvision:shufflenet_v2_x0_5", input_size=32)
    assert asked["weights_only"] is True
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert torch.allclose(encoder(images()), theirs(encoder.preprocess(images())), atol=1e-5)


def test_without_a_network_the_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no route\nto host")

    describe("timm:mobilenetv3_small_050")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("torchvision:shufflenet_v2_x0_5", "timm:mobilenetv3_small_050"):
        with pytest.raises(EncoderError, match=f"Cannot fetch the weights of {name} .*{name}@FILE") as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)
        with pytest.raises(
            EncoderError, match=f"weights of {name} need a download; allow it, or name a file"
        ):
            load_encoder(name, download=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_drops_the_known_classifier_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    def write(tensors: dict[str, Tensor]) -> str:
        path = tmp_path / f"w{suffix}"
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        return str(path)

    with isolated(3):
        for source, full in (
            ("timm:mobilenetv3_small_050", timm.create_model("mobilenetv3_small_050")),
            ("torchvision:shufflenet_v2_x0_5", torchvision.models.shufflenet_v2_x0_5()),
        ):
            tensors = full.state_dict()
            encoder = load_encoder(f"{source}@{write(tensors)}", download=False)
            own = encoder.backbone.state_dict()
            assert all(torch.equal(own[name], tensors[name]) for name in own)
            assert len(own) == len(tensors) - 2
            with pytest.raises(EncoderError, match=r"unexpected keys \[other_head.weight\]"):
                load_encoder(f"{source}@{write(tensors | {'other_head.weight': torch.zeros(1)})}")


def test_early_densenet_names_are_understood(tmp_path: Path) -> None:
    backbone = build_backbone("torchvision:densenet121")
    early = {
        name.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in name else name: tensor
        for name, tensor in backbone.state_dict().items()
    }
    save_file(early, tmp_path / "w.safetensors")
    loaded = load_encoder(f"torchvision:densenet121@{tmp_path / 'w.safetensors'}")
    assert torch.equal(loaded.backbone.state_dict()["features.conv0.weight"], early["features.conv0.weight"])


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["f.f.", "f.", "module.f.f.", "visual.f."])
@pytest.mark.parametrize("form", ["badencoder:{}", "{}"])
def test_simclr_checkpoints_are_found_by_their_keys(tmp_path: Path, prefix: str, form: str) -> None:
    encoder = small()
    path = tmp_path / "clean_model.pth"  # the name says nothing
    torch.save({"epoch": 3, "state_dict": simclr(encoder, prefix), "optimizer": {"state": {}}}, path)
    loaded = load_encoder(form.format(path))
    assert loaded.fingerprint == encoder.fingerprint
    assert not loaded.training


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_depth_width_and_stem_come_from_the_shapes(tmp_path: Path, name: str, stem: str) -> None:
    encoder = small(name, stem=stem, width=3)
    tensors = {key: value.contiguous() for key, value in encoder.backbone.state_dict().items()}
    tensors |= {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
    save_file(tensors, tmp_path / "w.safetensors")
    loaded = load_encoder(f"{name}:{tmp_path / 'w.safetensors'}")
    assert loaded.spec.architecture == f"encoderguard:{name}"
    assert (loaded.spec.width, loaded.spec.stem) == (3, stem)
    expected = ("cifar10", 32) if stem == "cifar" else ("imagenet", 224)
    assert (loaded.spec.mean, loaded.spec.std) == NORMALISATIONS[expected[0]]
    assert loaded.spec.input_size == expected[1]
    same = load_encoder(f"{name}-cifar10:{tmp_path / 'w.safetensors'}", input_size=32)
    assert same.fingerprint == encoder.fingerprint


def test_a_sequential_with_max_pooling_shifts_the_stages() -> None:
    found = identify(simclr(small(stem="imagenet"), maxpool=True), source="w")
    assert found.stem == "imagenet"
    assert set(found.tensors) == set(small(stem="imagenet").backbone.state_dict())


def test_the_normalisation_can_be_named(tmp_path: Path) -> None:
    torch.save(simclr(small()), tmp_path / "w.pth")
    stl10 = load_encoder(f"badencoder-stl10:{tmp_path / 'w.pth'}").spec
    assert (stl10.mean, stl10.std) == NORMALISATIONS["stl10"]
    given = load_encoder(
        f"badencoder-stl10:{tmp_path / 'w.pth'}", normalisation="none", std=(2, 2, 2), input_size=0
    )
    assert (given.spec.mean, given.spec.std, given.spec.input_size) == ((0, 0, 0), (2, 2, 2), None)
    with pytest.raises(EncoderError, match=r"Unknown normalisation 'svhn'"):
        load_encoder(f"badencoder-svhn:{tmp_path / 'w.pth'}")


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_the_imagenet_encoder_of_badencoder_sees_plain_pixels(tmp_path: Path, prefix: str) -> None:
    encoder = small("resnet50", stem="imagenet")
    torch.save(
        {prefix + key: value for key, value in encoder.backbone.state_dict().items()}, tmp_path / "w.pth"
    )
    spec = load_encoder(f"badencoder:{tmp_path / 'w.pth'}").spec
    assert (spec.mean, spec.std) == NORMALISATIONS["none"]
    assert spec.input_size == 224


def openai_names(backbone: nn.Module) -> dict[str, Tensor]:
    """The state of timm's RN50 image tower under the names that CLIP's authors gave it."""
    tensors = {}
    head = {
        "pos_embed": "positional_embedding",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "proj": "c_proj",
    }
    for name, tensor in backbone.state_dict().items():
        part = name.split(".")
        if part[0] == "stem":  # stem.conv1.bn.weight
            key = f"{part[2]}{part[1][4:]}.{part[3]}"
        elif part[0] == "head":  # head.q.weight
            key = ".".join(["attnpool", head[part[1]], *part[2:]])
        elif part[3] == "shortcut":  # stages.0.0.shortcut.conv.conv.weight
            key = f"layer{int(part[1]) + 1}.{part[2]}.downsample.{int(part[5] == 'bn')}.{part[-1]}"
        else:  # stages.0.0.conv1_1x1.bn.weight
            key = f"layer{int(part[1]) + 1}.{part[2]}.{part[4]}{part[3][4]}.{part[-1]}"
        tensors[key] = tensor
    return tensors


def test_the_rn50_image_tower_of_clip_is_read_with_and_without_prefix() -> None:
    backbone = build_backbone("timm:resnet50_clip.openai")
    bare = openai_names(backbone)
    prefixed = {f"visual.{name}": tensor for name, tensor in bare.items()} | {"logit_scale": torch.zeros(())}
    for tensors in (bare, prefixed):
        found = identify(tensors, source="w")
        assert found.normalisation == "clip"
        load_state(backbone, found.tensors, source="w")
    shallow = {name: tensor for name, tensor in bare.items() if not name.startswith("layer3.5")}
    with pytest.raises(EncoderError, match=r"\[3, 4, 5, 3\] blocks and width 64, but only RN50"):
        identify(shallow, source="w")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"class_embedding": torch.zeros(1)},
            "has no checkpoint layout that is known here .keys: class_embedding",
        ),
        ({"f.0.weight": torch.zeros(1)}, r"Sequential \(0, 1, four stages\), found positions \[0\]"),
        (
            {"conv1.weight": torch.zeros(4, 3, 5, 5), "layer1.0.conv1.weight": torch.zeros(1)},
            r"one of resnet18, resnet34, resnet50 .* found stages of \[1, 0, 0, 0\] basic blocks",
        ),
    ],
)
def test_unknown_layouts_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        identify(tensors, source="w")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    tensors = dict(small("resnet34").backbone.state_dict())
    torch.save(tensors, path)
    with pytest.raises(EncoderError, match=r"should hold a resnet18, found encoderguard:resnet34"):
        load_encoder(f"resnet18:{path}")
    with pytest.raises(EncoderError, match=r"missing keys \[.*\], unexpected keys \[.*\]"):
        load_encoder(f"torchvision:shufflenet_v2_x0_5@{path}")
    del tensors["layer4.0.bn2.bias"]
    torch.save(tensors, path)
    with pytest.raises(EncoderError, match=r"missing keys \[layer4.0.bn2.bias\], unexpected keys \[\]"):
        load_encoder(f"resnet34:{path}")


@pytest.mark.parametrize("spec", ["model.onnx", "resnet18", "hub:thing", "resnet18:", "", "timm", "timm:"])
def test_unknown_specifications_are_refused(spec: str) -> None:
    with pytest.raises(
        EncoderError, match=r"Unknown encoder specification .* expected bundle.safetensors, timm:NAME"
    ):
        load_encoder(spec)


@pytest.mark.parametrize("form", ["{}", "badencoder:{}", "resnet18:{}", "torchvision:shufflenet_v2_x0_5@{}"])
def test_a_missing_file_is_named(tmp_path: Path, form: str) -> None:
    with pytest.raises(EncoderError, match=r"There is no weight file .*none.pth"):
        load_encoder(form.format(tmp_path / "none.pth"))


# --- files that are not tensors -------------------------------------------------------------------


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("form", ["{}", "badencoder:{}", "resnet18:{}", "timm:mobilenetv3_small_050@{}"])
def test_a_malicious_pickle_is_never_executed(tmp_path: Path, kind: str, form: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "touched"
    content = {"state_dict": simclr(small()), "payload": Payload(target)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content["payload"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(EncoderError) as caught:
        load_encoder(form.format(path))
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_objects_beside_the_tensors_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": simclr(small()), "hparams": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"holds more than tensors .*nothing was executed.*in a sandbox"):
        load_encoder(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("name", ["w.pt", "w.pth.tar", "w.safetensors"])
def test_garbage_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        EncoderError,
        match=r"cannot be read as a PyTorch checkpoint|not a readable safetensors file|more than",
    ):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "a list"),
        ({}, r"\(none\)"),
        ({"epoch": 1, "net": {}}, "keys epoch, net"),
        (torch.zeros(1), "a Tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=f"should hold a state dict .* but holds .*{found}"):
        read_tensors(tmp_path / "w.pt")


# --- behaviour ------------------------------------------------------------------------------------


def scenes(count: int = 48) -> Tensor:
    """Smooth random colour fields with some grain: dark and bright, with structure at several scales."""
    generator = Rng(5).generator("scenes")
    parts = [
        nn.functional.interpolate(torch.randn(count, 3, s, s, generator=generator), (32, 32), mode="bilinear")
        for s in (1, 2, 4, 8, 32)
    ]
    weights = (0.13, 0.13, 0.13, 0.1, 0.03)
    field = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)
    return (0.47 + field).clamp(0, 1)


def seen(encoder: Encoder) -> Encoder:
    """The encoder after BatchNorm has seen the scenes: what training would have left there."""
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        encoder.train()(scenes())
    return encoder.eval()


def with_preprocessing(encoder: Encoder, **changes: Any) -> Encoder:
    return Encoder(encoder.backbone, encoder.spec.model_copy(update=changes))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_sane_encoder_gets_no_warning_and_is_not_changed(stem: str) -> None:
    encoder = seen(small(stem=stem, width=16)).train()
    before, state = encoder.fingerprint, torch.random.get_rng_state()
    assert check_encoder(encoder, scenes()) == []
    assert check_encoder(encoder, scenes() * 0.7) == []  # darker images
    assert check_encoder(encoder, scenes().mean(1, keepdim=True).expand(-1, 3, -1, -1)) == []  # grey images
    other = with_preprocessing(encoder, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert check_encoder(other, scenes()) == []
    assert encoder.fingerprint == before
    assert encoder.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(part._forward_pre_hooks for part in encoder.modules())


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "torchvision:shufflenet_v2_x0_5"])
def test_encoders_of_other_libraries_get_no_warning(name: str) -> None:
    assert check_encoder(seen(load_encoder(name, weights=False, input_size=64)), scenes()) == []


@pytest.mark.parametrize(
    "wrong", [((0, 0, 0), (1, 1, 1)), ((0, 0, 0), (1 / 255,) * 3), ((0.5,) * 3, (0.05,) * 3)]
)
def test_wrong_preprocessing_is_noticed(wrong: tuple[Any, Any]) -> None:
    encoder = with_preprocessing(seen(small(width=16)), mean=wrong[0], std=wrong[1])
    warnings = check_encoder(encoder, scenes())
    assert len(warnings) == 1
    assert "preprocessing is probably wrong" in warnings[0]


def test_normalising_for_an_encoder_trained_on_plain_pixels_is_noticed() -> None:
    plain = seen(with_preprocessing(small(width=16), mean=(0, 0, 0), std=(1, 1, 1)))
    assert check_encoder(plain, scenes()) == []
    mean, std = NORMALISATIONS["cifar10"]
    assert "preprocessing" in check_encoder(with_preprocessing(plain, mean=mean, std=std), scenes())[0]


def test_an_untrained_network_is_noticed() -> None:
    assert "untrained network" in check_encoder(small(width=16), scenes())[0]


class Reads(nn.Module):
    """Features that are a function of the mean colour only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        colour = x.mean((2, 3))
        if self.kind == "constant":
            return torch.ones(len(x), 8) + 1e-6 * colour[:, :1]
        if self.kind == "line":
            return colour[:, :1] * torch.arange(1.0, 9.0)
        return torch.cat([colour, colour.square()], dim=1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("constant", "almost the same for all images"),
        ("line", "along one direction only"),
        ("colour", "ignores what images show"),
    ],
)
def test_encoders_without_content_are_noticed(kind: str, message: str) -> None:
    (warning,) = check_encoder(Encoder.wrap(Reads(kind), taps=[]), scenes())
    assert message in warning


def test_damaged_weights_and_wrong_images_are_refused() -> None:
    encoder = seen(small(width=8))
    with pytest.raises(ImageError, match=r"at least 8 images"):
        check_encoder(encoder, scenes(4))
    with pytest.raises(ImageError, match=r"pixels in \[0, 1\], found 0 to 255"):
        check_encoder(encoder, (scenes() * 255).clamp(0, 255).floor() * torch.tensor([1.0]))
    with torch.no_grad():
        encoder.backbone.get_parameter("conv1.weight")[0] = torch.nan
    with pytest.raises(EncoderError, match=r"features of 100% of the images are not finite"):
        check_encoder(encoder, scenes())
