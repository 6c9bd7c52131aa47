"""MIMIC (Han et al. 2024): distil the benign knowledge of a suspect encoder into an empty student."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from lightly.models.modules import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn

from encoderguard.augment import SIMCLR
from encoderguard.disturbance import random_noise, random_patches
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.information import Measure, Profile, layer_profile, layer_weights
from encoderguard.losses import attention_loss, cosine_distance, nt_xent
from encoderguard.methods import Defense, Purified, require_images, require_taps
from encoderguard.random import isolated
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.training import Batch, Plan, train

__all__ = ["MIMIC"]

Mode = Literal["default", "paper", "authors"]
_BY_MODE: Any = None  # filled from the mode before the settings are checked
_PRESETS: dict[Mode, dict[str, Any]] = {
    "paper": {
        "measure": "mine",
        "source": "teacher",
        "pool": 4,
        "weighting": "zscore",
        "alpha0": 1.0,
        "alpha1": 1.0,
        "lambda1": 0.5,
        "lambda2": 1000.0,
        "reduction": "l2",
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "schedule": "constant",
        "epochs": 1000,
        "compare": "first",
        "patches": 0.0,
    },
    "authors": {
        "measure": "mine",
        "source": "student",
        "pool": 0,
        "weighting": "share",
        "alpha0": 1000.0,
        "alpha1": 10000.0,
        "lambda1": 1.0,
        "lambda2": 1.0,
        "reduction": "mean",
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "schedule": "constant",
        "epochs": 1000,
        "compare": "first",
        "patches": 0.0,
    },
    "default": {
        "measure": "cka",
        "source": "teacher",
        "pool": 1,
        "weighting": "share",
        "alpha0": 0.5,
        "alpha1": 2.0,
        "lambda1": 1.0,
        "lambda2": 3.0,
        "reduction": "l2",
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 1e-4,
        "schedule": "one_cycle",
        "epochs": 100,
        "compare": "both",
        "patches": 0.6,
    },
}


@register
@final
@dataclass(frozen=True, kw_only=True)
class MIMIC(Defense):
    """The backdoor sleeps on clean images: a student that only ever sees those need not learn it.

    Loss (Eq. 8): ``L0 + lambda1 L1 + lambda2 L2`` with ``L0 = 1 - cos(F(x), F'(x))``, ``L1`` = NT-Xent of the
    student's two views, ``L2 = sum_l beta_l`` times the distance of the attention maps of stage l, and beta
    from the dependence of the stages on the final features (Algorithm 1).

    Where the paper and the authors' code disagree, ``mode`` chooses: ``paper`` measures MINE on the teacher,
    takes beta by z-score (clamped at 0; the paper prints no alpha: 1 and 1 here) and the norm of Eq. 6;
    ``authors`` measures MINE in sample on the randomly initialised student, on whole maps, takes shares and
    averages squares over places; ``default`` is what worked best in our measurements (docs/methods/mimic.md):
    debiased CKA on the teacher, shares, the norm, a one-cycle schedule, and random patches pasted into what
    the student sees while the teacher sees the image without them: without patches the students of some
    seeds kept the backdoor. A setting that is given overrides its mode.

    All modes run one student and one teacher pass per step; the authors run five. ``compare`` says whether
    the two are compared on both views (default) or on the first only (the authors' code).
    """

    name: ClassVar[str] = "mimic"
    paper: ClassVar[str] = "Han et al. 2024, arXiv:2406.03508"
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "clean unlabelled images"
    cost: ClassVar[str] = "a short training, with a forward pass of the suspect at each step"
    spreads: ClassVar[bool] = True
    blind_spots: ClassVar[str] = (
        "Poison among the clean images is taught too; whether there was a backdoor stays open."
    )

    mode: Mode = "default"
    """Which set of defaults fills the settings that are not given."""
    epochs: Annotated[int, Field(ge=1)] = _BY_MODE
    """Passes over the clean images."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step."""
    lr: Annotated[float, Field(gt=0)] = _BY_MODE
    """The student's (peak) learning rate."""
    optimizer: Literal["adam", "adamw", "sgd"] = _BY_MODE
    """The student's optimiser."""
    weight_decay: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight decay."""
    schedule: Literal["constant", "cosine", "one_cycle"] = _BY_MODE
    """Learning rate over time."""
    lambda0: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cosine term L0."""
    lambda1: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight of the contrastive term L1."""
    lambda2: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight of the attention term L2."""
    reduction: Literal["l2", "mean"] = _BY_MODE
    """How L2 compares attention maps: the norm of Eq. 6, or the mean of squares over places."""
    measure: Measure = _BY_MODE
    """The dependence measure behind beta."""
    source: Literal["teacher", "student"] = _BY_MODE
    """On which network the dependence is measured."""
    pool: Annotated[int, Field(ge=0)] = _BY_MODE
    """Stage maps are averaged to pool x pool places before measuring; 0 takes them whole."""
    weighting: Literal["share", "zscore", "uniform"] = _BY_MODE
    """How the dependence becomes beta."""
    alpha0: Annotated[float, Field(ge=0)] = _BY_MODE
    """Base weight of beta."""
    alpha1: Annotated[float, Field(ge=0)] = _BY_MODE
    """Weight of the dependence in beta."""
    patches: Annotated[float, Field(ge=0, le=1)] = _BY_MODE
    """Probability that a random patch covers part of what the student alone sees; not in the paper."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that noise is blended into what the student alone sees; not in the paper."""
    compare: Literal["both", "first"] = _BY_MODE
    """On which of the two views student and teacher are compared (L0 and L2); NT-Xent always takes both."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """tau of NT-Xent."""
    profile_images: Annotated[int, Field(ge=32)] = 2000
    """At most this many of the clean images are used to measure dependence."""

    def __post_init__(self) -> None:
        """Fill the settings that were not given from the mode, then check all."""
        for key, value in _PRESETS.get(self.mode, {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()

    def purify(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Purified:
        """See Defense."""
        require_taps(encoder, "MIMIC")
        require_images(images, max(self.batch_size, 32), "MIMIC")
        teacher = encoder.frozen().to(run.device)
        student = teacher.fresh(run.rng.child("student")).to(run.device)
        profile, beta = self._locate(teacher if self.source == "teacher" else student, images, run)
        dim = student.feature_dim
        with isolated(run.rng.integer("head")):
            head = SimCLRProjectionHead(dim, dim, 128).to(run.device)
        model = nn.ModuleDict({"student": student, "head": head})

        def loss(batch: Batch) -> dict[str, Tensor]:
            return self._terms(batch, teacher, student, head, beta)

        history = train(model, loss, images, plan=self._plan(), run=run, task="distilling")
        evidence = {
            "profile": profile.model_dump(mode="json"),
            "beta": beta,
            "informative": profile.informative,
        }
        return Purified(encoder=student.eval(), history=history, evidence=evidence)

    def _plan(self) -> Plan:
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
        )

    def _locate(self, network: Encoder, images: ImageSet, run: Run) -> tuple[Profile, list[float]]:
        """Algorithm 1: the profile of the network and beta."""
        chosen = run.rng.permutation(len(images), "profile")[: self.profile_images]
        pixels = images.take(chosen).float() / 255
        authors = self.mode == "authors"
        profile = layer_profile(
            network,
            pixels,
            measure=self.measure,
            run=run,
            pool=self.pool,
            epochs=200 if authors else 30,
            hidden=512 if authors else 128,
            seeds=1 if authors else 3,
            hold_out=not authors,
        )
        values = [
            stage.train if authors else stage.held_out - max(0.0, stage.null) for stage in profile.stages
        ]
        weighting = self.weighting if authors or profile.informative else "uniform"
        return profile, layer_weights(values, weighting, alpha0=self.alpha0, alpha1=self.alpha1)

    def _terms(
        self, batch: Batch, teacher: Encoder, student: Encoder, head: nn.Module, beta: list[float]
    ) -> dict[str, Tensor]:
        n, peers, generator = len(batch.images), batch.peers, batch.rng.generator("views")
        views = torch.cat([SIMCLR(batch.images, generator, peers=peers) for _ in range(2)])
        drawing, blending = batch.rng.generator("patches"), batch.rng.generator("noise")
        seen = random_patches(views, self.patches, drawing, peers=peers, views=2)
        seen = random_noise(seen, self.noise, blending, peers=peers, views=2)
        with torch.no_grad():
            aim, aim_stages = teacher.features_and_stages(views if self.compare == "both" else views[:n])
        features, stages = student.features_and_stages(seen)
        terms = {"cosine (L0)": self.lambda0 * cosine_distance(features[: len(aim)], aim)}
        if self.lambda1 > 0:
            first, second = head(features).chunk(2)
            terms["nt_xent (L1)"] = self.lambda1 * nt_xent(first, second, self.temperature)
        if self.lambda2 > 0:
            distances = [
                weight * attention_loss(a[: len(b)], b, reduction=self.reduction)
                for weight, a, b in zip(beta, stages, aim_stages, strict=True)
            ]
            terms["attention (L2)"] = self.lambda2 * torch.stack(distances).sum()
        return terms
