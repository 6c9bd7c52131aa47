"""Weight files of other people's code: read as tensors only, recognised by their keys, renamed to ours."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.byobnet import ByobNet, checkpoint_filter_fn
from torch import Tensor

from encoderguard.architectures import build_backbone
from encoderguard.backbones import RESNETS, Stem
from encoderguard.errors import EncoderError

__all__ = ["Checkpoint", "identify", "read_tensors"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_CLIP = "timm:resnet50_clip.openai"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights in the names of an architecture that ``build_backbone`` knows."""

    architecture: str
    normalisation: str
    """What the code behind such files normalises with: ``cifar10``, ``imagenet``, ``clip`` or ``none``."""
    tensors: dict[str, Tensor]
    width: int = 64
    stem: Stem = "imagenet"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or a PyTorch checkpoint. Never executes what the file holds.

    A dict with a ``state_dict`` (or ``model``, ``model_state_dict``) entry is unwrapped, and the ``module.``
    prefix of data-parallel training is taken off.

    Raises:
        EncoderError: no such file; unreadable; or it holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise EncoderError(f"There is no weight file {path}.")
    content: Any = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise EncoderError(
            f"{path} should hold a state dict (names to tensors), directly or under 'state_dict', "
            f"but holds {_summary(content)}."
        )
    tensors = dict(content)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _summary(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dict with the keys {', '.join(map(str, list(content)[:6])) or '(none)'}"
    return f"a {type(content).__name__}"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path} is not a readable safetensors file: {error}.") from None


def _load_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage reaches torch's reader as almost any exception
        raise EncoderError(_refusal(path, error)) from None


def _refusal(path: Path, error: Exception) -> str:
    # by name: nothing here imports the module of that class
    if type(error).__name__ != "UnpicklingError" or not _may_be_pickled(path):
        return (
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}); "
            "expected a file written by torch.save, or a .safetensors file."
        )
    found = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
    return (
        f"{path} holds more than tensors{f' ({found[1]})' if found else ''}, and reading that could run "
        "code chosen by whoever wrote it, so nothing was executed; if you need this file, open it with "
        "torch.load(..., weights_only=False) in a sandbox without network and secrets, and store its "
        "state dict with safetensors.torch.save_file."
    )


def _may_be_pickled(path: Path) -> bool:
    """By the first bytes: those of a zip archive, or of a pickle with a protocol."""
    with path.open("rb") as stream:
        return stream.read(1) in (b"P", b"\x80")


def identify(tensors: Mapping[str, Tensor], *, source: str) -> Checkpoint:
    """Recognise a checkpoint by its key names and tensor shapes, never by its path.

    Known: torchvision's ResNet names; the SimCLR models of BadEncoder, MIMIC and DECREE (``f.f.3.0...``
    with a projector ``g.``, or ``f.3.0...``); the RN50 image tower of CLIP; each also below ``visual.``.

    Args:
        tensors: a state dict as ``read_tensors`` gives it.
        source: the file, for messages.

    Raises:
        EncoderError: none of these; the message lists some of the keys found.
    """
    towers = _below(tensors, "visual.")
    tensors = towers or dict(tensors)
    sequential = _below(tensors, "f.f.") or _below(tensors, "f.")
    if sequential:
        return _resnet(_named(sequential, source), None, source)
    if "attnpool.positional_embedding" in tensors:
        return _clip(tensors, source)
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        # BadEncoder's ImageNet encoder is trained on pixels in [0, 1] and kept below `visual.`
        return _resnet(tensors, "none" if towers else None, source)
    raise EncoderError(
        f"{source} has no checkpoint layout that is known here (keys: {', '.join(list(tensors)[:4])}, ...); "
        "expected ResNet names (conv1, layer1, ...), SimCLR names (f.f.0, f.f.3, ...) or the RN50 image "
        "tower of CLIP; name another architecture as in timm:NAME@FILE."
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _named(sequential: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Positions in the Sequential of a ResNet's children to names; a max-pooling shifts the stages by one."""
    positions = sorted({int(name.split(".")[0]) for name in sequential if name.split(".")[0].isdigit()})
    if len(positions) != 6 or positions[:2] != [0, 1]:
        raise EncoderError(
            f"{source} should hold a ResNet as a Sequential (0, 1, four stages), found positions {positions}."
        )
    names = dict(
        zip(map(str, positions), ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), strict=True)
    )
    split = {name: name.partition(".") for name in sequential}
    return {
        f"{names.get(split[name][0], split[name][0])}.{split[name][2]}": value
        for name, value in sequential.items()
    }


def _resnet(tensors: Mapping[str, Tensor], normalisation: str | None, source: str) -> Checkpoint:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    first = kept.get("conv1.weight", torch.empty(0))
    bottleneck = "layer1.0.conv3.weight" in kept
    depths = tuple(
        len({name.split(".")[1] for name in kept if name.startswith(f"layer{i}.")}) for i in range(1, 5)
    )
    found = [
        name
        for name, (block, known) in RESNETS.items()
        if known == depths and (block.expansion == 4) == bottleneck
    ]
    stems: dict[int, Stem] = {3: "cifar", 7: "imagenet"}
    if first.ndim != 4 or first.shape[1] != 3 or first.shape[3] not in stems or not found:
        raise EncoderError(
            f"{source} should be one of {', '.join(RESNETS)} with a 3 x 3 or 7 x 7 first convolution, found "
            f"stages of {list(depths)} {'bottleneck' if bottleneck else 'basic'} blocks and a first "
            f"convolution of shape {list(first.shape)}."
        )
    stem = stems[int(first.shape[3])]
    return Checkpoint(
        architecture=f"encoderguard:{found[0]}",
        normalisation=normalisation or ("cifar10" if stem == "cifar" else "imagenet"),
        tensors=kept,
        width=int(first.shape[0]),
        stem=stem,
    )


def _clip(tensors: Mapping[str, Tensor], source: str) -> Checkpoint:
    depths = tuple(
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{i}.")}) for i in range(1, 5)
    )
    width = int(tensors["layer1.0.conv1.weight"].shape[0]) if "layer1.0.conv1.weight" in tensors else 0
    if depths != (3, 4, 6, 3) or width != 64:
        raise EncoderError(
            f"{source} is an image tower of CLIP with stages of {list(depths)} blocks and width {width}, but "
            "only RN50 ([3, 4, 6, 3], width 64) is read from this layout; load others with timm:NAME."
        )
    with torch.device("meta"):
        skeleton = build_backbone(_CLIP)
    assert isinstance(skeleton, ByobNet)
    renamed = checkpoint_filter_fn({f"visual.{name}": tensor for name, tensor in tensors.items()}, skeleton)
    return Checkpoint(architecture=_CLIP, normalisation="clip", tensors=renamed)
