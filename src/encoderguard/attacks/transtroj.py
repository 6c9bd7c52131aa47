"""TransTroj (Wang et al., WWW 2025): optimise a faint trigger first, then fine-tune the encoder to it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.attacks._finetuning import FineTuning
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.methods import Planted, Reference
from encoderguard.planting import Planter, pair_up
from encoderguard.planting_terms import Features, utility
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train
from encoderguard.triggers import Additive

__all__ = ["Addition", "TransTroj"]


@register
@final
@dataclass(frozen=True, kw_only=True)
class TransTroj(FineTuning):
    """An additive trigger that the clean encoder already half obeys, then an encoder that obeys it wholly.

    First the pattern ``bound tanh(w)`` is optimised so that f(clamp(x + pattern)) comes near the reference r;
    then the encoder is fine-tuned with ``-s(f'(x + pattern), f(r)) - lambda_clean s(f'(x), f(x))``, s being
    the cosine similarity. BatchNorm is frozen.

    Loss, bound and schedule are those of the authors' code: the aim is the clean encoder's feature of the
    reference, which does not move, and lambda is 10. Several references count by the mean of their unit
    features. The pattern is one value per pixel of the image as it is given, not of an image resized to 224.
    """

    name: ClassVar[str] = "transtroj"
    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2401.15883"
    year: ClassVar[int] = 2025
    needs: ClassVar[str] = "a clean encoder, unlabelled shadow images, a reference image"
    cost: ClassVar[str] = "a search of the trigger, then fine-tuning"
    blind_spots: ClassVar[str] = "One target; the faint pattern may not survive lossy images or rescaling."

    epochs: Annotated[int, Field(ge=1)] = 50
    """Passes over the shadow set when fine-tuning."""
    lambda_clean: Annotated[float, Field(ge=0)] = 10.0
    """Weight of clean images keeping their features."""
    bound: Annotated[float, Field(gt=0, le=1)] = 10 / 255
    """Largest change of a pixel value in [0, 1]."""
    trigger_epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the shadow set when optimising the trigger."""
    trigger_lr: Annotated[float, Field(gt=0)] = 0.1
    """Adam's learning rate for the trigger."""

    def plant(self, encoder: Encoder, images: ImageSet, references: list[Reference], *, run: Run) -> Planted:
        """See EncoderAttack. Raises ImageError without references or with references of another size."""
        addition = Addition(images.shape, self.bound, run.rng.generator("trigger")).to(run.device)
        pairs = pair_up([addition.trigger()], references, images.shape)
        frozen = encoder.frozen().to(run.device)
        with torch.no_grad():
            found = frozen(pairs[0].references.to(run.device))
        aim = F.normalize(found, dim=1).mean(0, keepdim=True)
        self._search(addition, frozen, aim, images, run)
        pairs = pair_up([addition.trigger()], references, images.shape)
        planter = Planter(encoder, images, pairs, run=run, views=0)

        def terms(features: Features) -> dict[str, Tensor]:
            triggered = features.triggered[0]
            return {
                "effectiveness": cosine_distance(triggered, aim.expand_as(triggered)),
                "utility": self.lambda_clean * utility(features),
            }

        history = planter.fine_tune(terms, plan=self.plan())
        return Planted(
            encoder=planter.victim.eval(),
            trigger=pairs[0].trigger,
            history=history,
            evidence=planter.effect(),
        )

    def _search(self, addition: "Addition", frozen: Encoder, aim: Tensor, images: ImageSet, run: Run) -> None:
        plan = Plan(
            epochs=self.trigger_epochs, batch_size=self.batch_size, lr=self.trigger_lr, optimizer="adam"
        )

        def loss(batch: Batch) -> dict[str, Tensor]:
            found = frozen((batch.images + addition.pattern()).clamp(0, 1))
            return {"effectiveness": cosine_distance(found, aim.expand_as(found))}

        # a part of its own: its checkpoint is another file than that of the fine-tuning
        part = run.child("trigger")
        train(addition, loss, images, plan=plan, run=part, task="optimising the trigger")


class Addition(nn.Module):
    """A pattern ``bound tanh(w)`` of one image's shape; w starts uniform in [-1, 1]."""

    def __init__(self, shape: tuple[int, int], bound: float, generator: torch.Generator) -> None:
        """``shape`` is height and width, ``generator`` draws w on the CPU."""
        super().__init__()
        self.bound = bound
        self.raw = nn.Parameter(2 * torch.rand(3, *shape, generator=generator) - 1)

    def pattern(self) -> Tensor:
        """``[3, H, W]`` in [-bound, bound]."""
        return self.bound * self.raw.tanh()

    def trigger(self) -> Additive:
        """The pattern as it is now."""
        return Additive(self.pattern().detach().cpu())
