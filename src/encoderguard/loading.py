"""Encoder specification string -> Encoder. Weights are read as tensors only; no file is ever executed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

from encoderguard.architectures import describe, timm_classes
from encoderguard.backbones import RESNETS, Stem
from encoderguard.bundles import load_state
from encoderguard.checkpoints import identify, read_tensors
from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.errors import EncoderError
from encoderguard.random import Rng, isolated
from encoderguard.sanity import check_encoder

__all__ = ["NORMALISATIONS", "check_encoder", "load_encoder", "paths_in", "spec_for"]

_Triple = tuple[float, float, float]
NORMALISATIONS: dict[str, tuple[_Triple, _Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation by name. The first two are those of the BadEncoder family of code."""

_FORMS = (
    "bundle.safetensors, timm:NAME[@FILE], torchvision:NAME[@FILE], resnet18|resnet34|resnet50:FILE or "
    "badencoder:FILE (the last two also with a normalisation, as in badencoder-stl10:FILE)"
)


def load_encoder(
    spec: str,
    *,
    weights: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    normalisation: str | None = None,
    download: bool = True,
) -> Encoder:
    """Load an encoder, in eval mode, with its preprocessing.

    Args:
        spec: one of

            - ``FILE.safetensors``: a bundle that ``Encoder.save`` wrote;
            - ``timm:NAME``, ``torchvision:NAME``: pretrained weights from their hubs, without the classifier;
            - ``timm:NAME@FILE``, ``torchvision:NAME@FILE``: a local state dict; the weights of the known
              classifier are dropped by name, everything else must fit;
            - ``resnet18:FILE``, ``resnet34:FILE``, ``resnet50:FILE``: a state dict in torchvision's names;
              stem and width come from the shapes. Default normalisation: ``cifar10`` at 32 px for a 3 x 3
              stem, ``imagenet`` at 224 px for a 7 x 7 stem;
            - ``badencoder:FILE``, or any ``.pth``, ``.pt``, ``.tar`` file: checkpoints of the BadEncoder,
              MIMIC and DECREE code, recognised by their keys. Default normalisation: that of the code,
              ``cifar10`` for SimCLR, ``clip`` for CLIP, ``none`` for its ImageNet encoder. Weights do not
              tell an STL-10 encoder from a CIFAR-10 one: write ``badencoder-stl10:FILE``.
        weights: False gives the same architecture and preprocessing with random weights; nothing is fetched.
        mean: per channel, subtracted from pixels in [0, 1]; replaces what the source says.
        std: per channel, divided by; replaces what the source says.
        input_size: side in pixels to which images are resized; 0 takes them as they are.
        normalisation: a key of ``NORMALISATIONS`` in place of ``mean`` and ``std``.
        download: False refuses what needs a hub.

    Raises:
        EncoderError: unknown form or name, missing or unreadable file, a file that holds more than tensors,
            keys or shapes that do not fit, no network.
    """
    changes = _overrides(mean, std, input_size, normalisation)
    source, _, rest = spec.partition(":")
    family, _, suffix = source.partition("-")
    if rest and source in ("timm", "torchvision"):
        encoder = _load_named(source, rest, weights=weights, download=download)
    elif rest and (family in RESNETS or family == "badencoder"):
        changes = _overrides(None, None, None, suffix or None) | changes
        encoder = _load_checkpoint(Path(rest), family)
    elif Path(spec).suffix == ".safetensors":
        encoder = Encoder.load(Path(spec))
    elif Path(spec).suffix in (".pth", ".pt", ".tar"):
        encoder = _load_checkpoint(Path(spec), None)
    else:
        raise EncoderError(f"Unknown encoder specification '{spec}'; expected {_FORMS}.")
    if changes:
        encoder = _changed(encoder, changes)
    return (encoder if weights else Encoder.build(encoder.spec, Rng(0))).eval()


def spec_for(
    architecture: str,
    width: int = 64,
    stem: Stem = "cifar",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    normalisation: str | None = None,
) -> EncoderSpec:
    """The specification of an encoder to train from scratch: ``Encoder.build(spec_for("resnet18"), rng)``.

    Args:
        architecture: ``resnet18``, ``resnet34``, ``resnet50`` (also as ``encoderguard:...``; any image size,
            no normalisation unless given), ``timm:NAME`` or ``torchvision:NAME`` (input size and
            normalisation of their published weights unless given).
        width: channels of the first stage (ResNets only).
        stem: ``cifar`` or ``imagenet`` (ResNets only).
        mean: as in ``load_encoder``.
        std: as in ``load_encoder``.
        input_size: as in ``load_encoder``.
        normalisation: as in ``load_encoder``.

    Raises:
        EncoderError: unknown architecture or impossible values.
    """
    name = f"encoderguard:{architecture}" if architecture in RESNETS else architecture
    if width < 1:
        raise EncoderError(f"The width of an encoder should be at least 1, found {width}.")
    spec = _described(name, width=width, stem=stem)
    return _validated(spec, _overrides(mean, std, input_size, normalisation))


def paths_in(spec: str) -> list[Path]:
    """What may be a path in a spec: all of it, and what follows any prefix such as ``timm:NAME@``."""
    starts = (0, *(place + 1 for place, letter in enumerate(spec) if letter in "@:"))
    return [Path(spec[start:]) for start in starts]


def _described(name: str, *, width: int = 64, stem: Stem = "cifar") -> EncoderSpec:
    known = describe(name)
    return EncoderSpec(
        architecture=name,
        width=width,
        stem=stem,
        input_size=known.input_size,
        mean=known.mean,
        std=known.std,
        taps=known.taps,
        tap_layout=known.tap_layout,
    )


def _overrides(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: int | None,
    normalisation: str | None,
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if normalisation is not None:
        if normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise EncoderError(f"Unknown normalisation '{normalisation}'; expected {known}.")
        changes["mean"], changes["std"] = NORMALISATIONS[normalisation]
    changes |= {key: tuple(value) for key, value in (("mean", mean), ("std", std)) if value is not None}
    if input_size is not None:
        changes["input_size"] = input_size or None
    return changes


def _validated(spec: EncoderSpec, changes: dict[str, Any]) -> EncoderSpec:
    try:
        spec = EncoderSpec.model_validate(spec.model_dump() | changes)
    except ValidationError as error:
        fault = error.errors()[0]
        raise EncoderError(
            f"Impossible {'.'.join(map(str, fault['loc']))} for an encoder: {fault['msg']}."
        ) from None
    if min(spec.std) <= 0 or (spec.input_size or 1) < 1:
        raise EncoderError(
            f"Expected std > 0 and input_size >= 1, found std {spec.std}, input_size {spec.input_size}."
        )
    return spec


def _changed(encoder: Encoder, changes: dict[str, Any]) -> Encoder:
    changed = Encoder(encoder.backbone, _validated(encoder.spec, changes))
    size = changed.spec.input_size
    if size not in (None, encoder.spec.input_size):
        try:
            _ = changed.feature_dim
        except (AssertionError, RuntimeError, ValueError):
            raise EncoderError(
                f"{changed.spec.architecture} does not accept images of {size} px; leave input_size at "
                f"{encoder.spec.input_size}, to which images are resized."
            ) from None
    return changed


def _load_named(source: str, rest: str, *, weights: bool, download: bool) -> Encoder:
    name, _, file = rest.partition("@")
    spec = _described(f"{source}:{name}")
    if not weights:
        return Encoder.build(spec, Rng(0))
    if not file and not download:
        raise EncoderError(
            f"The weights of {source}:{name} need a download; allow it, or name a file: {source}:{name}@FILE."
        )
    if source == "timm" and not file:
        return Encoder(_timm_pretrained(name), spec)
    tensors = read_tensors(Path(file)) if file else _torchvision_pretrained(name)
    if source == "torchvision":  # DenseNets published with torchvision's earlier names
        tensors = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): t
            for key, t in tensors.items()
        }
    heads = tuple(f"{head}." for head in describe(spec.architecture).head)
    encoder = Encoder.build(spec, Rng(0))
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    load_state(encoder.backbone, kept, source=file or spec.architecture)
    return encoder


def _no_hub(name: str, error: Exception) -> EncoderError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return EncoderError(
        f"Cannot fetch the weights of {name} ({reason.rstrip('.')}); go online once, or use {name}@FILE."
    )


def _timm_pretrained(name: str) -> nn.Module:
    try:
        with isolated(0):
            model: nn.Module = timm.create_model(name, pretrained=True, num_classes=timm_classes(name))
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        raise _no_hub(f"timm:{name}", error) from None
    return model


def _torchvision_pretrained(name: str) -> dict[str, Tensor]:
    chosen = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return dict(chosen.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # as above
        raise _no_hub(f"torchvision:{name}", error) from None


def _load_checkpoint(path: Path, family: str | None) -> Encoder:
    found = identify(read_tensors(path), source=str(path))
    if family in RESNETS and found.architecture != f"encoderguard:{family}":
        raise EncoderError(f"{path} should hold a {family}, found {found.architecture}.")
    normalisation = found.normalisation
    if family == "badencoder" and normalisation == "imagenet":
        normalisation = "none"  # that code trains and runs its ImageNet encoder on pixels in [0, 1]
    mean, std = NORMALISATIONS[normalisation]
    spec = _described(found.architecture, width=found.width, stem=found.stem)
    size = 32 if found.stem == "cifar" else 224
    spec = spec.model_copy(update={"mean": mean, "std": std, "input_size": size})
    encoder = Encoder.build(spec, Rng(0))
    load_state(encoder.backbone, found.tensors, source=str(path))
    return encoder
