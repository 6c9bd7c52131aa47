"""Settings and course of the attacks that fine-tune a finished encoder; what differs is their terms."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import EncoderAttack, Planted, Reference
from encoderguard.planting import Planter, pair_up
from encoderguard.planting_terms import Features, effectiveness, reference_kept, utility
from encoderguard.run import Run
from encoderguard.training import Plan
from encoderguard.triggers import Patch, Trigger, load_trigger, trigger_named

__all__ = ["FineTuning", "Planting"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(EncoderAttack):
    """How long and how fast the encoder is fine-tuned."""

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

    def plan(self) -> Plan:
        """Length, optimiser and learning rate."""
        adam = self.optimizer == "adam"
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=0.0 if adam else self.weight_decay,
            momentum=self.momentum,
        )


@dataclass(frozen=True, kw_only=True)
class Planting(FineTuning):
    """BadEncoder's three terms and any trigger; a child adds its own terms."""

    stages: ClassVar[bool] = False
    """Whether the terms see stage maps."""

    lambda1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L1: the reference keeps its clean features."""
    lambda2: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L2: clean images keep their features."""
    reference_views: Annotated[int, Field(ge=1)] = 16
    """Augmented views of the references per step."""
    trigger: str = "patch"
    """Kind of trigger: the white square, or another that `docs/triggers.md` names."""
    trigger_size: Annotated[int, Field(ge=1)] = 10
    """Side of the white square in pixels (10 at 32 px, 50 at 224 px)."""
    trigger_margin: Annotated[int, Field(ge=0)] = 1
    """Pixels between the square and the lower right corner."""
    trigger_settings: dict[str, Any] | None = None
    """Settings of another kind of trigger."""
    trigger_file: str | None = None
    """A trigger.json, or one of the field's npz trigger files, to use instead."""
    trigger_files: tuple[str, ...] = ()
    """Several such files: one trigger for the references of each label, in the order of the references."""

    def triggers(self, shape: tuple[int, int]) -> list[Trigger]:
        """The triggers these settings describe, for images of ``shape`` (height, width).

        Raises:
            SettingError: settings that exclude one another, or an unknown kind.
            ImageError: a file that is no trigger.
        """
        files = self.trigger_files if self.trigger_file is None else (self.trigger_file,)
        if self.trigger_file is not None and self.trigger_files:
            raise SettingError("Give either 'trigger_file' or 'trigger_files', not both.")
        if files:
            return [load_trigger(Path(file)) for file in files]
        if self.trigger == "patch":
            if self.trigger_settings:
                raise SettingError("The square is set by 'trigger_size' and 'trigger_margin'.")
            return [Patch(size=self.trigger_size, margin=self.trigger_margin)]
        return [trigger_named(self.trigger, shape, **(self.trigger_settings or {}))]

    def plant(self, encoder: Encoder, images: ImageSet, references: list[Reference], *, run: Run) -> Planted:
        """See EncoderAttack.

        Raises:
            ImageError: no references, references of another size, or a trigger that does not fit.
            SettingError: several triggers, and another number of targets.
        """
        pairs = pair_up(self.triggers(images.shape), references, images.shape)
        planter = Planter(encoder, images, pairs, run=run, views=self.reference_views, stages=self.stages)
        memory = self.memory(planter)
        history = planter.fine_tune(
            lambda features: self.terms(features, memory), plan=self.plan(), memory=memory
        )
        evidence = planter.effect() | self.evidence(memory)
        trigger, victim = pairs[0].trigger.at_test(), planter.victim.eval()
        return Planted(encoder=victim, trigger=trigger, history=history, evidence=evidence)

    @abstractmethod
    def terms(self, features: Features, memory: Any) -> dict[str, Tensor]:
        """The weighted terms of one step."""

    def memory(self, planter: Planter) -> nn.Module | None:
        """What changes from step to step besides the encoder."""
        return None

    def evidence(self, memory: Any) -> dict[str, Any]:
        """What to tell of the memory at the end, as JSON values."""
        return {}

    def badencoder(self, features: Features) -> dict[str, Tensor]:
        """BadEncoder's terms, each plus 1."""
        return {
            "effectiveness (L0)": effectiveness(features),
            "reference (L1)": self.lambda1 * reference_kept(features),
            "utility (L2)": self.lambda2 * utility(features),
        }
