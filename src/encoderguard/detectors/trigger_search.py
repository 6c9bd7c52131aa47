"""Trigger search: six families of triggers, each judged against what clean encoders reach."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

from pydantic import Field

from encoderguard.bank import bank
from encoderguard.collapse import Collapse
from encoderguard.detectors._references import load_references
from encoderguard.detectors._remembered import continued, remembered
from encoderguard.detectors._students import distil, tuned
from encoderguard.detectors._telling import smallest_p, telling, to_unlearn
from encoderguard.detectors._trigger_evidence import evidence_of
from encoderguard.detectors._trigger_verdict import (
    Judged,
    NullKind,
    Rule,
    judge,
    judge_by_bank,
    statistics_of,
    unlikeness,
)
from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.images import ImageSet
from encoderguard.methods import Detection, Detector, require_images
from encoderguard.rays import FAMILIES, Ray, TriggerFamily
from encoderguard.registry import register
from encoderguard.run import Run
from encoderguard.search import Budget, Found, Images, search
from encoderguard.triggers import Trigger

__all__ = ["TriggerSearch"]

_LEAST = 8


@register
@final
@dataclass(frozen=True, kw_only=True)
class TriggerSearch(Detector):
    """Looks for weak triggers of six families that collapse the features of clean images.

    Collapse is the mean cosine of features of different stamped images, standardised over the clean images;
    displacement is how far a stamped image moves from itself.
    Three stages: a bank of some 300 candidates by forward passes alone (patches, blends, additive noise,
    spectral waves, colour changes, warps); gradient refinement of the best patches, blends and additive
    patterns with successive halving; the same at weaker and stronger levels. The result is one curve of
    collapse over strength per family; its mean in Fisher's z is the statistic, judged family by family
    against clean reference encoders, or students distilled from the suspect. A second statistic is how much
    further than in those a candidate of the bank moves the features. All are combined after Holm.

    Ours, not from one paper. The collapse objective is DECREE's (Feng et al. 2023) in a centred feature
    space; successive halving over candidates is in the spirit of K-Arm (Shen et al. 2021); the moderated t
    is Smyth's (2004). Unlike DECREE it does not look for the smallest mask, because a gradient search for
    that missed a planted white square that plain candidates find, and because no single mask covers a blend.
    """

    name: ClassVar[str] = "trigger_search"
    paper: ClassVar[str] = "ours; objective after Feng et al. 2023, arXiv:2303.15180"
    needs: ClassVar[str] = "clean unlabelled images; for a verdict, clean encoders of the same architecture"
    cost: ClassVar[str] = "a search, mostly forward passes; students add a short training each"
    blind_spots: ClassVar[str] = (
        "Triggers that differ from image to image, generated or semantic ones, and any that no candidate of "
        "the six families comes near."
    )

    references: tuple[str, ...] = ()
    """Clean encoders of the suspect's architecture, or a zoo's folder; each is searched as the suspect is."""
    remember: str | None = None
    """Folder to keep the references' searches in: the next suspect on the same images costs one search."""
    students: Annotated[int, Field(ge=0)] = 0
    """Without references: students distilled from the suspect on clean images; evidence, no verdict."""
    student_steps: Annotated[int, Field(ge=1)] = 400
    """Training steps per student, of up to 64 images."""
    fpr: Annotated[float, Field(gt=0, lt=0.25)] = 0.05
    """Rate of clean encoders that may be called backdoored."""
    margin: Annotated[float, Field(ge=0)] = 0.25
    """Besides being significant, a statistic must exceed every clean encoder's by so much."""
    prior_spread: Annotated[float, Field(gt=0)] = 0.1
    """Expected standard deviation of a curve's statistic over clean encoders; counts as four references."""
    moved_spread: Annotated[float, Field(gt=0)] = 0.15
    """The same of how much further than in clean encoders a candidate moves the features (a log ratio)."""
    families: tuple[TriggerFamily, ...] = FAMILIES
    """Families that are searched."""
    images: Annotated[int, Field(ge=_LEAST)] = 64
    """Clean images to search with; as many others, if given, to measure the curves on."""
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the bank that is tried."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Candidates per family that are tried at every strength, and refined."""
    starts: Annotated[int, Field(ge=1)] = 6
    """Starts of each refinement; those beyond `keep` are random."""
    steps: Annotated[int, Field(ge=0)] = 20
    """Steps of each refinement; 0 searches by forward passes alone."""
    tune_steps: Annotated[int, Field(ge=0)] = 20
    """Contrastive steps of a copy on clean images, to see whether the found triggers survive; 0 skips it."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Time budget per searched encoder; the best so far is used. The result then depends on the machine."""

    def detect(self, encoder: Encoder, images: ImageSet, *, run: Run) -> Detection:
        """Judge ``encoder``; ``score`` is 1 minus the smallest family p-value, large if suspicious.

        Raises:
            ImageError: fewer than eight images.
            EncoderError: a reference cannot be loaded.
            SettingError: a reference is of another architecture, or is the suspect itself; no family.
            NonFiniteError: features or loss are NaN or infinite.
            Stopped: the user asked to stop.
        """
        require_images(images, _LEAST, "The trigger search")
        if not self.families:
            raise SettingError(
                "The trigger search needs at least one family, found none; leave it out for all."
            )
        references = load_references(self.references, encoder)
        used = Images(images, self.images, run)
        found = self._search(encoder, used, "suspect", run)
        seconds = {f"suspect_{stage}": took for stage, took in found.seconds.items()}
        begun = time.monotonic()
        others = references or self._students(encoder, images, run)
        seconds["students"] = 0.0 if references else time.monotonic() - begun
        begun = time.monotonic()
        nulls = {name: self._search_null(other, used, name, run) for name, other in others.items()}
        seconds["null"] = time.monotonic() - begun
        kind: NullKind = "references" if references else "students" if others else "bank"
        unlike = unlikeness(found.measures, [null.measures for null in nulls.values()])
        rule = self.rule(unlike)
        judged = self._judge(found, list(nulls.values()), kind, rule)
        triggers = {family: telling(found, list(nulls.values()), judged, family) for family in self.families}
        best = min(self.families, key=lambda f: (smallest_p(judged, f), -found.families[f].statistic))
        strongest, plain = to_unlearn(found.families[best], triggers[best], judged, best, self.fpr)
        evidence = evidence_of(found, nulls, judged, kind, rule=rule)
        begun = time.monotonic()
        evidence |= self._natural_or_injected(encoder, others, triggers, used, run)
        evidence |= _nearest(encoder, triggers[best], used, run)
        seconds["natural_or_injected"] = time.monotonic() - begun
        return Detection(
            verdict=judged.verdict,
            score=judged.score,
            threshold=judged.threshold,
            trigger=triggers[best],
            triggers={str(family): trigger for family, trigger in triggers.items()},
            strongest=strongest,
            plain=plain,
            p_value=judged.p_value,
            evidence=evidence | {"best_family": best, "seconds": seconds},
        )

    def _students(self, encoder: Encoder, images: ImageSet, run: Run) -> dict[str, Encoder]:
        return {
            f"student {k}": distil(encoder, images, self.student_steps, run=run.child("student", k))
            for k in range(self.students)
        }

    def rule(self, unlike: float = 1.0) -> Rule:
        """How sure a verdict has to be of a suspect that is so unlike its references."""
        return Rule(
            fpr=self.fpr,
            margin=self.margin,
            prior_spread=self.prior_spread,
            moved_spread=self.moved_spread,
            unlike=unlike,
        )

    def _search(self, encoder: Encoder, used: Images, name: str, run: Run) -> Found:
        """The same seed for every encoder, so that all are asked the same questions."""
        budget = Budget(keep=self.keep, starts=self.starts, steps=self.steps, seconds=self.seconds)
        rays = self._rays(used, run)
        facts = self._facts(encoder, used, run)
        return continued(
            run.child("search", facts["encoder"][:16]),
            facts,
            rays,
            lambda: search(
                encoder, used.searched, used.held_out, rays, budget, run=run.child("search"), name=name
            ),
        )

    def _search_null(self, encoder: Encoder, used: Images, name: str, run: Run) -> Found:
        """As ``_search``, without doing one again that was kept; a time budget makes no two alike."""
        if self.remember is None or not self.references or self.seconds is not None:
            return self._search(encoder, used, name, run)
        facts = self._facts(encoder, used, run)
        rays = self._rays(used, run)
        return remembered(Path(self.remember), facts, rays, lambda: self._search(encoder, used, name, run))

    def _rays(self, used: Images, run: Run) -> dict[TriggerFamily, tuple[Ray, ...]]:
        every = bank(used.images.shape, run.rng.child("bank"), scale=self.scale, grey=used.grey)
        return {family: every[family] for family in self.families}

    def _facts(self, encoder: Encoder, used: Images, run: Run) -> dict[str, Any]:
        """Everything that a search depends on."""
        shared = ("families", "images", "scale", "keep", "starts", "steps")
        facts = {key: value for key, value in self.settings().items() if key in shared}
        facts |= {"encoder": encoder.fingerprint, "pictures": used.images.digest, "sides": used.images.shape}
        return facts | {"streams": run.rng.integer("remembered"), "bf16": run.low_precision}

    def _judge(self, found: Found, nulls: list[Found], kind: NullKind, rule: Rule) -> Judged:
        if kind != "bank":
            values, others = statistics_of(found.measures, [null.measures for null in nulls])
            return judge(values, others, kind, rule)
        curves = dict(found.measures.curves)
        return judge_by_bank(curves, {str(family): result.bank for family, result in found.families.items()})

    def _natural_or_injected(
        self,
        encoder: Encoder,
        known: dict[str, Encoder],
        triggers: dict[TriggerFamily, Trigger],
        used: Images,
        run: Run,
    ) -> dict[str, Any]:
        """What the suspect's triggers do to clean encoders, and to a copy after a little clean training."""
        others = {f"on {name}": other for name, other in known.items()}
        if self.tune_steps:
            others["after tuning"] = tuned(encoder, used.images, self.tune_steps, run=run.child("tuned"))
        found = {
            name: dict(
                zip(
                    triggers,
                    Collapse(other, used.held_out, run=run, exact=True).of(list(triggers.values())),
                    strict=True,
                )
            )
            for name, other in {"on the suspect": encoder, **others}.items()
        }
        return {"collapse_of_found_triggers": found}


def _nearest(encoder: Encoder, trigger: Trigger, used: Images, run: Run) -> dict[str, Any]:
    """Clean images whose features lie nearest to where the stamped ones collapse to."""
    places, cosines = Collapse(encoder, used.held_out, run=run, exact=True).nearest(trigger, 8)
    return {
        "nearest_images": used.order[places].tolist(),
        "nearest_cosines": [round(value, 4) for value in cosines.tolist()],
    }
