"""Methods that take no time: jobs and the command line treat every method alike."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from encoderguard.encoder import Encoder, EncoderSpec
from encoderguard.images import ImageSet
from encoderguard.methods import (
    Defense,
    Detection,
    Detector,
    EncoderAttack,
    Monitor,
    Planted,
    Pretrained,
    Pretraining,
    Purified,
    Reference,
)
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train
from encoderguard.triggers import MaskedPattern, Patch

NAME = "toy"
SPEC = EncoderSpec(architecture="encoderguard:resnet18", width=2)


def toy_encoder(seed: int = 0) -> Encoder:
    return Encoder.build(SPEC, Rng(seed)).eval()


def toy_images(count: int = 32, side: int = 16, *, labelled: bool = False) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=Rng(1).generator(), dtype=torch.uint8)
    labels = torch.arange(count) % 2 if labelled else None
    return ImageSet.from_arrays(pixels, labels, ("even", "odd") if labelled else (), name="noise")


@dataclass(frozen=True, kw_only=True)
class ToyDetector(Detector):
    """Says what it is told to.

    It does not look.
    """

    name: ClassVar[str] = NAME
    paper: ClassVar[str] = "nobody, nowhere"

    verdict: Literal["backdoored", "clean", "inconclusive"] = "clean"
    """The answer."""
    score: float = 0.5
    fail: Literal["", "bug", "memory", "stop"] = ""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        if self.fail == "bug":
            raise ZeroDivisionError("a bug")
        if self.fail == "memory":
            raise MemoryError
        if self.fail == "stop":
            run.stop.requested = True
            run.check_stop()
        mask = torch.zeros(images.shape)
        mask[:2] = 1
        trigger = MaskedPattern(mask, torch.ones(3, *images.shape))
        return Detection(verdict=self.verdict, score=self.score, threshold=0.25, trigger=trigger)


class _Trained:
    """Moves an encoder's weights by one scalar loss; enough steps for a checkpoint to matter."""

    epochs: int
    batch_size: int

    def run_training(
        self, encoder: Encoder, images: ImageSet, run: Run
    ) -> tuple[Encoder, dict[str, list[float]]]:
        model = encoder.clone().requires_grad_(True)
        plan = Plan(epochs=self.epochs, batch_size=self.batch_size, lr=1e-3)

        def loss(batch: Batch) -> dict[str, torch.Tensor]:
            return {"size": model(batch.images).square().mean()}

        history = train(model, loss, images, plan=plan, run=run, task=NAME)
        return model.eval(), history


@dataclass(frozen=True, kw_only=True)
class ToyPretraining(_Trained, Pretraining):
    """Trains to nothing."""

    name: ClassVar[str] = NAME

    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=2)] = 8

    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        trained, history = self.run_training(encoder, images, run)
        return Pretrained(encoder=trained, history=history)


@dataclass(frozen=True, kw_only=True)
class ToyAttack(_Trained, EncoderAttack):
    """Plants nothing."""

    name: ClassVar[str] = NAME

    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=2)] = 8

    def plant(self, encoder: Encoder, images: ImageSet, references: list[Reference], *, run: Run) -> Planted:
        trained, history = self.run_training(encoder, images, run)
        return Planted(
            encoder=trained, trigger=Patch(size=4), history=history, evidence={"looked": len(references)}
        )


@dataclass(frozen=True, kw_only=True)
class ToyDefense(_Trained, Defense):
    """Defends against nothing."""

    name: ClassVar[str] = NAME

    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=2)] = 8

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        trained, history = self.run_training(encoder, images, run)
        return Purified(encoder=trained, history=history, evidence={"beta": [1.0, float("nan")]})


TOYS = (ToyPretraining, ToyAttack, ToyDetector, ToyDefense)
