"""SSLDefender (Zhang et al.): recover a distribution of triggers, then unlearn it beside a clean teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field

from encoderguard.defenses._ssl_sources import Source, known, measured
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.features import extract
from encoderguard.generators import Bound
from encoderguard.images import ImageSet
from encoderguard.methods import Defense, History, Purified
from encoderguard.mixing import Mix
from encoderguard.recovery import RecoveryPlan, Stamp, Turns, alternating, recover
from encoderguard.registry import register
from encoderguard.repair import UTILITY_FLOOR, Repair, begin
from encoderguard.run import Run
from encoderguard.search import STANDS_OUT, suspicion
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.training import Plan
from encoderguard.triggers import Trigger, load_found
from encoderguard.unlearning import UnlearningLoss, tuned_teacher, unlearn

__all__ = ["SSLDefender"]

Mode = Literal["default", "paper"]
_BY_MODE: Any = None  # filled from the mode before the settings are checked
_PRESETS: dict[Mode, dict[str, Any]] = {
    "paper": {
        "recovery": "generators",
        "relative": False,
        "mix": "patch",
        "patch": 0.2,
        "recovery_steps": 600,
        "recovery_batch": 256,
        "recovery_lr": 2e-4,
        "turns": "batch",
        "rounds": 1,
        "teacher": "tuned",
        "paired": 0.0,
        "root": True,
        "views": False,
        "epochs": 500,
        "batch_size": 256,
        "lr": 1e-3,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "schedule": "constant",
        "utility_floor": 0.0,
    },
    "default": {
        "recovery": "search",
        "relative": True,
        "mix": "mask",
        "patch": 0.25,
        "recovery_steps": 240,
        "recovery_batch": 32,
        "recovery_lr": 2e-3,
        "turns": "image",
        "rounds": 2,
        "teacher": "frozen",
        "paired": 1.0,
        "root": False,
        "views": False,
        "epochs": 25,
        "batch_size": 64,
        "lr": 1e-3,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "schedule": "cosine",
        "utility_floor": UTILITY_FLOOR,
    },
}


@register
@final
@dataclass(frozen=True, kw_only=True)
class SSLDefender(Defense):
    """Recovers triggers that make clean images look alike, and teaches the encoder to ignore them.

    Stage one (Eq. 1 to 5): n sub-generators, each with a threshold of similarity and a statistics
    network that keeps its triggers diverse. Stage two (Eq. 6 to 8): ``alpha SW(student stamped, student
    clean) + beta SW(student clean, teacher clean)`` with the sliced Wasserstein-2 distance.

    There is no public code; where the paper leaves a gap or errs, both modes do this. The hinge of Eq. 5
    is ``max(0, epsilon - cosine)``: as printed, with ``L_cos = -cosine``, its sign drives stamped images
    apart. Cosines leave out the diagonal of Eq. 3. The information is that of a trigger and its own
    noise; with the independent noise of Eq. 5 it is 0. Eq. 7 takes sorted projections, squared. Clean
    features are a fixed aim in the first term, and BatchNorm keeps its statistics. ``mode=paper`` pastes
    squares of a fifth of the side at random places, roots the distances and fine-tunes the teacher by
    SimCLR's loss. ``mode=default`` is what worked best in our measurements
    (docs/methods/ssl_defender.md): our trigger search as stage one, as learnt triggers missed a planted
    white square, and the suspect itself as the teacher. With ``recovery=generators`` it learns masks, kept
    small as DECREE does it (the paper leaves ``Mix`` open, and a whole image is trivial), with thresholds
    that count from the clean images' own similarity.
    """

    name: ClassVar[str] = "ssl_defender"
    paper: ClassVar[str] = "Zhang et al. 2025, SSLDefender (IEEE Transactions)"
    year: ClassVar[int] = 2025
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "one trigger search and one fine-tuning"
    blind_spots: ClassVar[str] = (
        "What the recovery does not find is not unlearnt: triggers that differ from image to image, or that "
        "neither make images look alike nor are a patch of one colour at one place."
    )

    mode: Mode = "default"
    """Which set of defaults fills the settings that are not given."""
    recovered_trigger: str | None = None
    """To unlearn without a recovery: the folder of a scan, for all that it found, or one trigger file."""
    recovery: Literal["generators", "search"] = _BY_MODE
    """Stage one: sub-generators, or the trigger search's bank of plain candidates and their refinement."""
    generators: Annotated[int, Field(ge=1, le=64)] = 3
    """n, the number of sub-generators."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Threshold epsilon of the first sub-generator; those between are evenly spaced."""
    highest: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Threshold epsilon of the last sub-generator."""
    relative: bool = _BY_MODE
    """Whether a threshold counts from the mean cosine of clean images (0) to 1, instead of from 0."""
    mix: Mix = _BY_MODE
    """How triggers get into images: a square ``patch`` at random places, or a learnt ``mask`` kept small."""
    patch: Annotated[float, Field(gt=0, le=1)] = _BY_MODE
    """Side of the square over the image's."""
    size: Annotated[float, Field(ge=0)] = 0.3
    """Weight of a mask's mean, its size, beside the similarity; not in the paper."""
    information: Annotated[float, Field(ge=0)] = 0.1
    """eta, the weight of the mutual information of trigger and noise; 0 leaves it out."""
    bound: Bound = "dv"
    """Which lower bound on the information: Donsker-Varadhan or Jensen-Shannon."""
    recovery_steps: Annotated[int, Field(ge=1)] = _BY_MODE
    """Steps of the recovery, rounded up to whole passes over the images."""
    recovery_batch: Annotated[int, Field(ge=2)] = _BY_MODE
    """Images per step of the recovery; every sub-generator sees all of them."""
    recovery_lr: Annotated[float, Field(gt=0)] = _BY_MODE
    """Adam's peak learning rate in the recovery; masks move 100 times as fast."""
    turns: Turns = _BY_MODE
    """Whether sub-generators take turns from image to image, or one is drawn for each batch."""
    rounds: Annotated[int, Field(ge=1, le=20)] = _BY_MODE
    """Rounds at most: triggers are recovered, from the encoder as it is, and unlearnt with those before."""
    teacher: Literal["frozen", "tuned"] = _BY_MODE
    """The suspect as it is (the backdoor sleeps on clean images), or a copy fine-tuned by SimCLR's loss."""
    teacher_epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the images that tune the teacher."""
    alpha: Annotated[float, Field(ge=0)] = 0.5
    """Weight of L1, between the student's stamped and clean images."""
    beta: Annotated[float, Field(ge=0)] = 0.5
    """Weight of L2, between clean images of student and teacher."""
    paired: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight of the cosine distance to the teacher's features of the same clean image; not in the paper."""
    directions: Annotated[int, Field(ge=1)] = 256
    """M, fresh random directions per step."""
    root: bool = _BY_MODE
    """Whether distances are rooted, as Eq. 7 prints, or squared."""
    views: bool = _BY_MODE
    """Whether unlearning takes SimCLR's views of the images in the place of the images."""
    epochs: Annotated[int, Field(ge=1)] = _BY_MODE
    """Passes over the images that unlearn."""
    batch_size: Annotated[int, Field(ge=2)] = _BY_MODE
    """Images per step of unlearning."""
    lr: Annotated[float, Field(gt=0)] = _BY_MODE
    """Learning rate of unlearning."""
    optimizer: Literal["adam", "adamw", "sgd"] = _BY_MODE
    """Optimiser of unlearning."""
    weight_decay: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight decay of unlearning."""
    schedule: Literal["constant", "cosine", "one_cycle"] = _BY_MODE
    """Learning rate of unlearning over time."""
    utility_floor: Annotated[float, Field(ge=0, le=1)] = _BY_MODE
    """The last epoch of unlearning with at least this utility counts."""

    def __post_init__(self) -> None:
        """Fill the settings that were not given from the mode, then check all."""
        for key, value in _PRESETS.get(self.mode, {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()
        if self.lowest > self.highest:
            raise SettingError(
                f"Setting 'lowest' of defense 'ssl_defender' is {self.lowest:g}, above 'highest', "
                f"{self.highest:g}; the first threshold is the lowest."
            )

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense.

        Raises:
            ImageError: too few images, or no recovered trigger there, or one of another size.
            EncoderError: the encoder gives the same features for all images.
            NonFiniteError: its features are NaN or infinite.
        """
        if not self.alpha and not self.beta and not self.paired:
            raise SettingError("SSLDefender has nothing to minimise: alpha, beta and paired are all 0.")
        given = self._given(images)
        repair = begin(
            encoder,
            images,
            batch_size=self.batch_size if given else max(self.batch_size, self.recovery_batch),
            floor=self.utility_floor,
            purpose="SSLDefender",
            run=run,
        )
        teacher, start = self._teacher(repair, run), repair.suspect
        history, stamps, rounds = History(), list[Stamp](), list[dict[str, Any]]()
        shown: Trigger | None = None
        left: dict[str, float] | None = None
        for number in range(1 if given else self.rounds):
            part = run.child("round", number)
            source = known(given) if given else self._recovered(start, repair.images, part, first=not rounds)
            if rounds and source.excess and max(source.excess.values()) < STANDS_OUT:
                left = source.excess
                break
            stamps.append(source.stamp)
            shown = shown or source.example
            done = unlearn(
                start,
                teacher,
                alternating(stamps),
                repair,
                loss=self._loss(),
                plan=self._plan(self.epochs),
                views=self.views,
                run=part,
            )
            for name, curve in (source.curves | done.history).items():
                history.setdefault(name, []).extend(curve)
            found = measured(source.parts, start, done.encoder, repair.gate.images, part)
            rounds.append({"excess": source.excess, "triggers": found, **done.evidence(repair.gate)})
            start = done.encoder.frozen()
        reasons = [entry["fallback"] for entry in rounds if entry["fallback"]]
        evidence = {
            "rounds": rounds,
            "recovered": not given,
            "left": left,
            "utility_after": rounds[-1]["utility_after"],
            "fallback": reasons[0] if reasons else None,
        }
        return Purified(encoder=done.encoder, history=history, evidence=evidence, trigger=shown)

    def _recovered(self, start: Encoder, images: ImageSet, run: Run, *, first: bool) -> Source:
        if self.recovery == "search":
            # what only moves features is unlearnt in the first round; later ones look for collapse
            found = suspicion(start, images, run=run.child("search"), moves=first)
            return known(found.triggers, found.excess)
        plan = self._recovery(start, images, run)
        learnt = recover(start, images, plan, run=run.child("recover"))
        curves = {f"recovery/{name}": curve for name, curve in learnt.history.items()}
        return Source(learnt.stamp(self.turns), learnt.parts(), learnt.example(-1, run.rng), curves)

    def _given(self, images: ImageSet) -> list[Trigger]:
        if self.recovered_trigger is None:
            return []
        triggers = load_found(Path(self.recovered_trigger))
        for trigger in triggers:
            trigger(torch.zeros(1, 3, *images.shape))  # raises if it is for another size
        return triggers

    def _recovery(self, encoder: Encoder, images: ImageSet, run: Run) -> RecoveryPlan:
        level = 0.0
        if self.relative:
            level = float(mean_pairwise_cosine(extract(encoder, images, run=run)))
        return RecoveryPlan(
            thresholds=tuple(torch.linspace(self.lowest, self.highest, self.generators).tolist()),
            level=level,
            size=self.size,
            steps=self.recovery_steps,
            batch_size=self.recovery_batch,
            lr=self.recovery_lr,
            mix=self.mix,
            patch=self.patch,
            information=self.information,
            bound=self.bound,
        )

    def _teacher(self, repair: Repair, run: Run) -> Encoder:
        if self.teacher == "frozen":
            return repair.suspect
        return tuned_teacher(
            repair.suspect, repair.images, plan=self._plan(self.teacher_epochs), run=run.child("teacher")
        )

    def _loss(self) -> UnlearningLoss:
        return UnlearningLoss(
            alpha=self.alpha,
            beta=self.beta,
            paired=self.paired,
            directions=self.directions,
            root=self.root,
        )

    def _plan(self, epochs: int) -> Plan:
        return Plan(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )
