"""Encoder: pixels in [0, 1] to features and stage maps. Only here are images resized and normalised."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.architectures import build_backbone
from encoderguard.backbones import Stem
from encoderguard.bundles import Storage, load_state, read_bundle, write_bundle
from encoderguard.errors import EncoderError
from encoderguard.modules import evaluating, reinitialise
from encoderguard.random import Rng, isolated

__all__ = ["Encoder", "EncoderSpec"]

_REGISTER = 16
"""float32 values in the widest vector register (AVX-512)."""


class EncoderSpec(BaseModel):
    """Everything about an encoder but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    architecture: str
    """``encoderguard:resnet18``, ``timm:NAME``, ``torchvision:NAME``, or ``custom:...`` if wrapped."""
    width: Annotated[int, Field(ge=1)] = 64
    """Channels of the first stage (``encoderguard:`` architectures only)."""
    stem: Stem = "cifar"
    input_size: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels to which images are resized; None takes them as they are."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    taps: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")
    """Module names whose outputs are the stage maps, shallow to deep."""
    tap_layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Layout of four-dimensional tap outputs; three-dimensional ones are token sequences."""


@final
class Encoder(nn.Module):
    """A backbone with its preprocessing and named taps."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self._layout = torch.contiguous_format if _unsafe(backbone) else torch.channels_last
        self.backbone = backbone.to(memory_format=self._layout)
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        known = dict(backbone.named_modules())
        unknown = [tap for tap in spec.taps if tap not in known]
        if unknown:
            raise EncoderError(
                f"The backbone has no module '{unknown[0]}' to tap; it has: {', '.join(list(known)[1:9])}..."
            )

    @classmethod
    def build(cls, spec: EncoderSpec, rng: Rng) -> "Encoder":
        """An encoder of this specification with fresh random weights."""
        with isolated(rng.integer("weights")):
            return cls(build_backbone(spec.architecture, width=spec.width, stem=spec.stem), spec)

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        *,
        taps: Sequence[str],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        input_size: int | None = None,
        tap_layout: Literal["NCHW", "NHWC"] = "NCHW",
        name: str = "module",
    ) -> "Encoder":
        """Anybody's module that maps normalised ``[N, 3, H, W]`` to ``[N, D]``, or to a map (averaged).

        Args:
            module: used in place, not copied.
            taps: names of its submodules whose outputs are stage maps, shallow to deep.
            mean: per channel, subtracted from pixels in [0, 1].
            std: per channel, divided by.
            input_size: side in pixels that images are resized to; None leaves them.
            tap_layout: layout of four-dimensional tap outputs.
            name: shown in records.
        """
        spec = EncoderSpec(
            architecture=f"custom:{name}",
            input_size=input_size,
            mean=tuple(mean),  # type: ignore[arg-type]
            std=tuple(std),  # type: ignore[arg-type]
            taps=tuple(taps),
            tap_layout=tap_layout,
        )
        return cls(module, spec)

    def preprocess(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] to what the backbone was trained on.

        Raises:
            EncoderError: the batch has another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise EncoderError(f"Expected images of shape [N, 3, H, W], found {list(images.shape)}.")
        size = self.spec.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return ((images - self.mean) / self.std).contiguous(memory_format=self._layout)

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 ``[N, D]``, of images ``[N, 3, H, W]`` in [0, 1]."""
        features: Tensor = self.backbone(self.preprocess(images))
        if features.ndim == 4:
            features = features.mean((2, 3))
        if features.ndim != 2:
            raise EncoderError(f"Expected the backbone to return [N, D], found shape {list(features.shape)}.")
        return features.float()

    def stages(self, images: Tensor) -> list[Tensor]:
        """K stage maps ``[N, C_k, H_k, W_k]``, shallow to deep; tokens come as a grid."""
        return self.features_and_stages(images)[1]

    def features_and_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features and stage maps of one forward pass; the hooks live for that pass only."""
        maps: dict[str, Tensor] = {}
        modules = dict(self.backbone.named_modules())

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
                maps[name] = output

            return hook

        handles = [modules[tap].register_forward_hook(keep(tap)) for tap in self.spec.taps]
        try:
            features = self(images)
        finally:
            for handle in handles:
                handle.remove()
        return features, [_as_map(maps[tap], self.spec.tap_layout) for tap in self.spec.taps]

    @property
    def feature_dim(self) -> int:
        """D, found by one forward pass of a grey image."""
        size = self.spec.input_size or 32
        with evaluating(self), torch.no_grad():
            return int(self(torch.full((1, 3, size, size), 0.5, device=self.mean.device)).shape[1])

    @property
    def fingerprint(self) -> str:
        """sha256 over weights, architecture and preprocessing."""
        digest = hashlib.sha256(self.spec.model_dump_json().encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def clone(self) -> "Encoder":
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def frozen(self) -> "Encoder":
        """A copy in eval mode whose weights take no gradient."""
        return self.clone().eval().requires_grad_(False)

    def fresh(self, rng: Rng) -> "Encoder":
        """The empty student: the same architecture and preprocessing with random weights.

        Raises:
            EncoderError: no ``reset_parameters`` of a wrapped module draws all of its weights anew.
        """
        if not self.spec.architecture.startswith("custom:"):
            return Encoder.build(self.spec, rng).to(self.mean.device)
        student = self.clone().train().requires_grad_(True)
        with isolated(rng.integer("weights")):
            reinitialise(student.backbone)
        return student

    def save(
        self, path: Path, provenance: dict[str, Any] | None = None, *, dtype: Storage = "float32"
    ) -> Path:
        """Write a one-file safetensors bundle atomically; ``provenance`` goes into its metadata.

        ``dtype="float16"`` halves the file and rounds the weights; they are float32 again once loaded.

        Raises:
            EncoderError: a weight is too large for float16.
        """
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in self.backbone.state_dict().items()
        }
        spec = self.spec.model_dump(mode="json")
        return write_bundle(path, tensors, spec=spec, provenance=provenance or {}, dtype=dtype)

    @classmethod
    def load(cls, path: Path, *, backbone: nn.Module | None = None) -> "Encoder":
        """Read a bundle. ``backbone`` is needed for a wrapped module only: the same class, any weights.

        Raises:
            EncoderError: not a bundle, a newer format, or keys and shapes that do not fit.
        """
        header, tensors = read_bundle(path)
        try:
            spec = EncoderSpec.model_validate(header.get("spec"))
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
            raise EncoderError(f"The specification in {path} is not valid: {fault}.") from None
        if spec.architecture.startswith("custom:") and backbone is None:
            raise EncoderError(
                f"{path} holds the weights of a wrapped module ({spec.architecture}); "
                "load it from Python with Encoder.load(path, backbone=your_module)."
            )
        encoder = cls.build(spec, Rng(0)) if backbone is None else cls(backbone, spec)
        load_state(encoder.backbone, tensors, source=str(path))
        return encoder.eval()


def _as_map(output: Tensor, layout: str) -> Tensor:
    if output.ndim == 4:
        return output if layout == "NCHW" else output.permute(0, 3, 1, 2)
    if output.ndim == 3:  # [N, T, C]: class and register tokens come first, patch tokens fill a square grid
        side = int(output.shape[1] ** 0.5)
        tokens = output[:, output.shape[1] - side * side :]
        return tokens.transpose(1, 2).reshape(output.shape[0], output.shape[2], side, side)
    raise EncoderError(f"A tap must return [N, C, H, W] or [N, T, C], found shape {list(output.shape)}.")


def _unsafe(backbone: nn.Module) -> bool:
    """Whether oneDNN's channels-last kernels would write behind their memory: see ``backbones``."""
    return any(
        isinstance(part, nn.Conv2d)
        and part.in_channels < _REGISTER
        and part.kernel_size == (1, 1)
        and part.stride != (1, 1)
        for part in backbone.modules()
    )
