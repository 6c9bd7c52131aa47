"""Backbones by name, with random weights and without a classifier. Nothing is downloaded here."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import timm
import torch
import torchvision
from torch import Tensor, nn

from encoderguard.backbones import RESNETS, ResNet, Stem
from encoderguard.errors import EncoderError
from encoderguard.random import isolated

__all__ = ["Architecture", "build_backbone", "describe", "timm_classes"]

_AUXILIARY = ("googlenet", "inception_v3")  # they return tuples while they train
_Shapes = dict[str, tuple[int, ...]]
_Built = TypeVar("_Built")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What its library says of an architecture, beside the weights."""

    taps: tuple[str, ...]
    """At most four module names, shallow to deep: one per resolution, or evenly spaced blocks of a ViT."""
    tap_layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Layout of the taps' four-dimensional outputs."""
    input_size: int | None = None
    """Side in pixels that the published weights were trained for; None: any."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    head: tuple[str, ...] = ()
    """Names of the classifiers that were taken off; published files still hold their weights."""


def build_backbone(architecture: str, *, width: int = 64, stem: Stem = "cifar") -> nn.Module:
    """A module that maps normalised images to features.

    Args:
        architecture: ``encoderguard:resnet18|resnet34|resnet50``, ``timm:NAME`` or ``torchvision:NAME``.
        width: channels of the first stage (``encoderguard:`` only).
        stem: ``cifar`` or ``imagenet`` (``encoderguard:`` only).

    Raises:
        EncoderError: no such architecture, or one whose classifier is not known.
    """
    source, _, name = architecture.partition(":")
    if source == "encoderguard":
        _require(name, RESNETS, source)
        return ResNet(name, width=width, stem=stem)
    if source == "torchvision":
        return _torchvision(name)[0]
    if source == "timm":
        return _timm(name)
    raise EncoderError(
        f"Unknown architecture '{architecture}'; "
        f"expected encoderguard:{'|'.join(RESNETS)}, timm:NAME or torchvision:NAME."
    )


@lru_cache(maxsize=32)
def describe(architecture: str) -> Architecture:
    """Taps, layout, input size and normalisation of an architecture, without its weights.

    The module is built on the meta device and run there once, so this is quick even for large models.

    Raises:
        EncoderError: as ``build_backbone``; or no feature taps are known.
    """
    source, _, name = architecture.partition(":")
    if source == "torchvision":
        return _describe_torchvision(name, *_on_meta(lambda: _torchvision(name)))
    if source == "timm":
        return _describe_timm(name, _on_meta(lambda: _timm(name)))
    _on_meta(lambda: build_backbone(architecture))
    return Architecture(taps=("layer1", "layer2", "layer3", "layer4"), head=("fc",))


def _require(name: str, known: Iterable[str], source: str) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known[:4]
        raise EncoderError(f"There is no model '{name}' in {source}; did you mean {' or '.join(close)}?")


def _on_meta(build: Callable[[], _Built]) -> _Built:
    with isolated(0):
        try:
            with torch.device("meta"):
                return build()
        except NotImplementedError:  # an initialiser that looks at its values
            return build()


def _output_shapes(model: nn.Module, names: Iterable[str], size: int) -> _Shapes:
    """Shapes of these modules' outputs, in the order in which they finish, for one square image."""
    shapes: _Shapes = {}
    modules = dict(model.named_modules())

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes.pop(name, None)
                shapes[name] = tuple(output.shape)

        return hook

    handles = [modules[name].register_forward_hook(watch(name)) for name in names if name in modules]
    device = next(model.parameters()).device
    with torch.device(device), torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return shapes


def _layout(shape: Sequence[int]) -> Literal["NCHW", "NHWC"]:
    return "NHWC" if shape[1] == shape[2] != shape[3] else "NCHW"


def _evenly(items: Sequence[str], count: int = 4) -> tuple[str, ...]:
    """The last item of each of ``count`` equal parts."""
    count = min(count, len(items))
    return tuple(items[(k + 1) * len(items) // count - 1] for k in range(count))


# --- torchvision --------------------------------------------------------------------------------


def _torchvision(name: str) -> tuple[nn.Module, str]:
    """The model without its last linear layer and the dropout before it, and that layer's name."""
    _require(name, torchvision.models.list_models(module=torchvision.models), "torchvision")
    if name in _AUXILIARY:
        raise EncoderError(
            f"torchvision:{name} has auxiliary classifiers; load it with Encoder.wrap instead."
        )
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    linears = [key for key, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linears:
        raise EncoderError(f"torchvision:{name} has no linear classifier; load it with Encoder.wrap instead.")
    parent_name, _, leaf = linears[-1].rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, leaf, nn.Identity())
    if parent is not model:
        for key, part in parent.named_children():
            if isinstance(part, nn.Dropout):
                setattr(parent, key, nn.Identity())
    return model, linears[-1]


def _describe_torchvision(name: str, model: nn.Module, head: str) -> Architecture:
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = int(getattr(model, "image_size", transforms.crop_size[0]))
    taps, layout = _torchvision_taps(model, size)
    return Architecture(
        taps=taps,
        tap_layout=layout,
        input_size=size,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        head=(head,),
    )


def _torchvision_taps(model: nn.Module, size: int) -> tuple[tuple[str, ...], Literal["NCHW", "NHWC"]]:
    if isinstance(model, torchvision.models.VisionTransformer):
        return _evenly([f"encoder.layers.{key}" for key, _ in model.encoder.layers.named_children()]), "NCHW"
    names = [key for key, _ in model.named_modules() if key and key.count(".") <= 1]
    shapes = {key: shape for key, shape in _output_shapes(model, names, size).items() if len(shape) == 4}
    layout = _layout(next(iter(shapes.values())))
    last: dict[int, str] = {}  # resolution -> the module that finishes last there
    for key, shape in shapes.items():
        if shape[2] > 1 and _layout(shape) == layout:
            last[shape[2]] = key
    return tuple(last[side] for side in sorted(last, reverse=True)[-4:]), layout


# --- timm ---------------------------------------------------------------------------------------


def _timm(name: str) -> nn.Module:
    if not timm.is_model(name):
        _require(name.partition(".")[0], timm.list_models(), "timm")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=timm_classes(name))
    except RuntimeError as error:  # an unknown tag after the dot
        raise EncoderError(f"timm cannot build '{name}': {error}") from None
    return model


def timm_classes(name: str) -> int:
    """What to pass to timm as ``num_classes``: 0, or the size of CLIP's embedding.

    The projection of CLIP's attention pooling makes its embedding; timm calls it the classifier.
    """
    config = timm.get_pretrained_cfg(name)
    return int(config.num_classes) if config is not None and config.classifier == "head.proj" else 0


def _describe_timm(name: str, model: nn.Module) -> Architecture:
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    infos: Any = getattr(model, "feature_info", None)
    infos = infos.get_dicts() if hasattr(infos, "get_dicts") else infos
    channels, size, _ = config["input_size"]
    if not infos or channels != 3:
        raise EncoderError(
            f"timm:{name} reports no feature taps for RGB images; load it with Encoder.wrap instead."
        )
    modules = [str(info["module"]) for info in infos]
    plain = len({info["reduction"] for info in infos}) == 1  # one resolution throughout: a plain ViT
    taps = _evenly(modules) if plain else tuple(modules[-4:])
    shapes = _output_shapes(model, taps, size)
    if any(len(shapes.get(tap, ())) not in (3, 4) for tap in taps):
        raise EncoderError(
            f"The feature taps of timm:{name} are not maps or tokens; load it with Encoder.wrap instead."
        )
    layouts = {_layout(shape) for shape in shapes.values() if len(shape) == 4}
    classifier = config.get("classifier") or ()
    head = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return Architecture(
        taps=taps,
        tap_layout="NHWC" if "NHWC" in layouts else "NCHW",
        input_size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        head=() if head == ("head.proj",) else head,
    )
