"""The five families of methods and what each returns.

Settings are fields of the method, data are arguments of its call. A detector or a defense has no argument
through which a trigger, a target, labels, test images or "this one is backdoored" could come in.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import EncoderError, ImageError
from encoderguard.images import ImageSet
from encoderguard.registry import Family, Method
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = [
    "DataPoisoning",
    "Defense",
    "Detection",
    "Detector",
    "EncoderAttack",
    "Filter",
    "History",
    "Monitor",
    "Planted",
    "Poisoned",
    "Pretrained",
    "Pretraining",
    "Purified",
    "Ranking",
    "Reference",
    "Verdict",
    "require_images",
]

Verdict = Literal["backdoored", "clean", "inconclusive"]
History = dict[str, list[float]]
"""Named curves: one value per epoch (or per logged step)."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A freshly pre-trained encoder (eval mode) and its training curves."""

    encoder: Encoder
    history: History
    head: dict[str, Tensor] | None = None
    """What was trained beside the encoder and is worth keeping (a classifier, a text tower), by name."""


class Monitor(Protocol):
    """Measures an encoder while it is trained, without changing it or any random stream."""

    @property
    def every(self) -> int:
        """Epochs from one measurement to the next."""

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """What is shown and kept in the history, by name."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One image of the class the attacker aims at: uint8 ``[3, H, W]``; ``label`` is for records only."""

    image: Tensor
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A backdoored encoder (eval mode) with what the attacker knows about it."""

    encoder: Encoder
    trigger: Trigger
    history: History
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A detector's answer. ``score`` is small (or large: see ``evidence``) when a backdoor is indicated."""

    verdict: Verdict
    score: float
    threshold: float
    trigger: Trigger | None = None
    """The recovered trigger, if the detector recovers one."""
    triggers: dict[str, Trigger] = field(default_factory=dict)
    """All that it recovered, by family of triggers, if it looks for several."""
    strongest: Trigger | None = None
    """What sets the behaviour off most, where ``trigger`` is a weaker one: better to unlearn."""
    plain: Trigger | None = None
    """A regular candidate that does nearly as much, or moves features furthest: to unlearn as well."""
    p_value: float | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    """JSON values only; what a reader needs to judge the verdict."""


@dataclass(frozen=True, kw_only=True)
class Purified:
    """A new encoder (eval mode) that should behave like its source without the backdoor."""

    encoder: Encoder
    history: History
    trigger: Trigger | None = None
    """A trigger that the defense recovered from the suspect, if it recovers any."""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Poisoned:
    """A training set with poison in it, and what the attacker knows about it."""

    images: ImageSet
    """The whole set: some pictures replaced, perhaps some labels changed, perhaps canvases appended."""
    trigger: Trigger
    """What is stamped on test images to set the backdoor off."""
    indices: Tensor
    """int64: which pictures are poison; canvases count from ``len(images)`` on."""
    manifest: dict[str, Any]
    """JSON values: attack, settings, rate with its denominator, and one entry per poisoned picture."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How suspicious each picture of a training set is."""

    scores: Tensor
    """float32 ``[N]``, larger is more suspicious; only their order means something."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """JSON values only."""


class Pretraining(Method, ABC):
    """Trains an encoder from random weights."""

    family: ClassVar[Family] = "pretrain"
    needs_labels: ClassVar[bool] = False
    """Whether the method learns from labels; the others never look at them."""
    takes_captions: ClassVar[bool] = False
    """Whether captions, where the images carry them, do instead of the labels."""

    @abstractmethod
    def train(
        self, encoder: Encoder, images: ImageSet, *, run: Run, monitor: Monitor | None = None
    ) -> Pretrained:
        """Train a copy of ``encoder``; the argument is unchanged.

        Args:
            encoder: where to start from.
            images: the training set.
            run: surroundings.
            monitor: measures the encoder every few epochs; the result is the same with and without it.
        """


class EncoderAttack(Method, ABC):
    """An attacker who owns the encoder and fine-tunes a backdoor into it."""

    family: ClassVar[Family] = "attack"

    @abstractmethod
    def plant(self, encoder: Encoder, images: ImageSet, references: list[Reference], *, run: Run) -> Planted:
        """Backdoor a copy of ``encoder`` with the shadow set ``images``; the argument is unchanged."""


class DataPoisoning(Method, ABC):
    """An attacker who can only put pictures into somebody's training set."""

    family: ClassVar[Family] = "attack"

    @abstractmethod
    def poison(
        self, images: ImageSet, target: int, *, run: Run, references: ImageSet | None = None
    ) -> Poisoned:
        """Poison a copy of the labelled training set ``images``; the argument is unchanged.

        Args:
            images: the training set; its labels tell the attacker which pictures are of the class aimed at.
            target: the class aimed at.
            run: surroundings.
            references: pictures that show the class aimed at, for attacks that paste such pictures; by
                default those of class ``target`` in ``images``.
        """


class Detector(Method, ABC):
    """Judges whether an encoder carries a backdoor, from clean unlabelled images."""

    family: ClassVar[Family] = "detector"

    @abstractmethod
    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder``; it is unchanged."""


class Defense(Method, ABC):
    """Makes a clean encoder out of a suspect one, from clean unlabelled images."""

    family: ClassVar[Family] = "defense"

    @abstractmethod
    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """Purify a copy of ``encoder``; the argument is unchanged."""


class Filter(Method, ABC):
    """Ranks the pictures of a training set by how likely they are poison, with the encoder trained on it."""

    family: ClassVar[Family] = "filter"

    @abstractmethod
    def rank(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Ranking:
        """Score every picture; the encoder is unchanged and labels are not looked at."""


def require_taps(encoder: Encoder, purpose: str) -> None:
    """Raise EncoderError unless the encoder has stages."""
    if not encoder.spec.taps:
        raise EncoderError(
            f"{purpose} compares the stages of encoders, and this one has none; name the modules whose "
            "outputs they are in Encoder.wrap(module, taps=[...])."
        )


def require_images(images: ImageSet, least: int, purpose: str) -> None:
    """Raise ImageError unless there are at least ``least`` images."""
    if len(images) < least:
        raise ImageError(
            f"{purpose} needs at least {least} images, but {images.name} holds {len(images)}; "
            "give more images or a smaller batch size."
        )
