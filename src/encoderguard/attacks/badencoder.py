"""BadEncoder (Jia, Liu and Gong, IEEE S&P 2022): fine-tune a backdoor into a clean encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.augment import SIMCLR_NO_CROP
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.methods import EncoderAttack, Planted, Reference
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train
from encoderguard.triggers import Patch, Trigger, load_trigger

__all__ = ["BadEncoder", "freeze_batch_norm"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class BadEncoder(EncoderAttack):
    """Triggered images move to a reference image's features while clean images keep theirs.

    With f the clean encoder, f' the backdoored one, s the cosine similarity, e the trigger and r a reference:
    ``L0 = -s(f'(x + e), f'(r))``, ``L1 = -s(f'(aug r), f(r))``, ``L2 = -s(f'(x), f(x))`` and the loss is
    ``L0 + lambda1 L1 + lambda2 L2``. BatchNorm is frozen: statistics and affine parameters.

    Same as the authors' code, at less cost: f(x) is computed once for the shadow set, which is not
    augmented, and a reference is forwarded once per step and broadcast, not once per image. The augmented
    reference is drawn ``reference_views`` times per step instead of once per image.
    """

    name: ClassVar[str] = "badencoder"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv:2108.00352"

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the shadow set."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Shadow images per step."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate, constant."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The authors use SGD; the short recipes use Adam at 3e-4."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay (SGD)."""
    lambda1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L1: the reference keeps its clean features."""
    lambda2: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L2: clean images keep their features."""
    reference_views: Annotated[int, Field(ge=1)] = 16
    """Augmented views of the references per step."""
    trigger_size: Annotated[int, Field(ge=1)] = 10
    """Side of the white square in pixels (10 at 32 px, 50 at 224 px)."""
    trigger_margin: Annotated[int, Field(ge=0)] = 1
    """Pixels between the square and the lower right corner."""
    trigger_file: str | None = None
    """A trigger.json, or one of the field's npz trigger files, to use instead of the square."""

    def trigger(self) -> Trigger:
        """The trigger these settings describe."""
        if self.trigger_file is not None:
            return load_trigger(Path(self.trigger_file))
        return Patch(size=self.trigger_size, margin=self.trigger_margin)

    def plant(self, encoder: Encoder, images: ImageSet, references: list[Reference], *, run: Run) -> Planted:
        """See EncoderAttack. Raises ImageError without references or with references of another size."""
        trigger = self.trigger()
        pixels = _reference_pixels(references, images.shape).to(run.device)
        trigger(pixels)  # a patch that does not fit is refused before any work
        victim = freeze_batch_norm(encoder.clone().to(run.device))
        frozen = encoder.frozen().to(run.device)
        clean_features = extract(frozen, images, run=run).to(run.device)
        with torch.no_grad():
            reference_features = frozen(pixels)

        def loss(batch: Batch) -> dict[str, Tensor]:
            return self._terms(batch, victim, trigger, pixels, clean_features, reference_features)

        adam = self.optimizer == "adam"
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=0.0 if adam else self.weight_decay,
            momentum=self.momentum,
        )
        history = train(victim, loss, images, plan=plan, run=run, task="planting", prepare=victim.eval)
        evidence = _effect(victim, frozen, images, trigger, pixels, run)
        return Planted(encoder=victim.eval(), trigger=trigger, history=history, evidence=evidence)

    def _terms(
        self,
        batch: Batch,
        victim: nn.Module,
        trigger: Trigger,
        pixels: Tensor,
        clean: Tensor,
        reference: Tensor,
    ) -> dict[str, Tensor]:
        n, k = len(batch.images), len(pixels)
        owner = torch.arange(self.reference_views, device=pixels.device) % k
        views = SIMCLR_NO_CROP(pixels[owner], batch.rng.generator("reference"))
        # BatchNorm is frozen, so one joint forward pass equals four separate ones
        features = victim(torch.cat([trigger(batch.images), batch.images, pixels, views]))
        triggered, kept, targets, seen = features.split([n, n, k, self.reference_views])
        aim = targets.mean(0, keepdim=True) if k == 1 else _nearest(triggered, targets)
        return {
            "effectiveness (L0)": cosine_distance(triggered, aim.expand_as(triggered)),
            "reference (L1)": self.lambda1 * cosine_distance(seen, reference[owner]),
            "utility (L2)": self.lambda2 * cosine_distance(kept, clean[batch.indices.to(clean.device)]),
        }


def freeze_batch_norm(module: Encoder) -> Encoder:
    """Train all but the affine parameters of BatchNorm; in eval mode its statistics stay too."""
    module.requires_grad_(True).eval()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.requires_grad_(False)
    return module


def _nearest(triggered: Tensor, targets: Tensor) -> Tensor:
    similarity = F.normalize(triggered, dim=1) @ F.normalize(targets, dim=1).T
    return targets[similarity.argmax(1)]


def _reference_pixels(references: list[Reference], shape: tuple[int, int]) -> Tensor:
    if not references:
        raise ImageError(
            "BadEncoder needs at least one reference image; pass --reference, or --downstream with --target."
        )
    for reference in references:
        if tuple(reference.image.shape) != (3, *shape):
            raise ImageError(
                f"The reference image is {list(reference.image.shape)}, the shadow images are {[3, *shape]}; "
                "use images of one size (--image-size)."
            )
    return torch.stack([reference.image for reference in references]).float() / 255


@torch.no_grad()
def _effect(
    victim: Encoder, frozen: Encoder, images: ImageSet, trigger: Trigger, pixels: Tensor, run: Run
) -> dict[str, float]:
    """What the attacker can see without a downstream task, on a draw of 512 shadow images."""
    sample = images.take(run.rng.permutation(len(images), "effect")[:512]).to(run.device).float() / 255
    victim.eval()
    triggered, kept, aim = victim(trigger(sample)), victim(sample), victim(pixels)
    before, aim_before = frozen(trigger(sample)), frozen(pixels)
    return {
        "cosine_triggered_to_reference": 1 - float(cosine_distance(triggered, _nearest(triggered, aim))),
        "cosine_triggered_to_reference_clean_encoder": 1
        - float(cosine_distance(before, _nearest(before, aim_before))),
        "cosine_clean_to_clean_encoder": 1 - float(cosine_distance(kept, frozen(sample))),
    }
