"""What an encoder is worth (ACC) and how far a known backdoor reaches (ASR), as fractions of test images.

These functions know labels, trigger and target: they judge, they never detect or purify.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from scipy import stats
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError, SettingError
from encoderguard.features import extract
from encoderguard.fidelity import Fidelity, label_free_fidelity, trojai_fidelity
from encoderguard.images import ImageSet
from encoderguard.modules import evaluating
from encoderguard.probes import Classifier, Probe, make_probe
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = [
    "Evaluation",
    "Fidelity",
    "Measure",
    "evaluate_encoder",
    "label_free_fidelity",
    "measure",
    "target_of_reference",
    "trojai_fidelity",
]


class Measure(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A fraction of test images, measured with one probe or with several."""

    mean: float
    """Over the probe seeds."""
    std: float | None
    """Sample standard deviation over the probe seeds; None for one seed."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    interval: Literal["wilson", "student-t"]
    """``wilson``: one probe; what other test images of the same kind would give. ``student-t``: several
    probes; what other probe seeds would give on these very test images. These are two different questions."""
    per_seed: list[float]
    n: int
    """Test images that each value is a fraction of."""


class Evaluation(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """ACC and ASR of an encoder, and of its clean counterpart with its own probe under the same trigger."""

    acc: Measure
    """Test images that get their own label."""
    asr: Measure | None = None
    """Stamped test images of *other* classes that get the target label."""
    asr_all: Measure | None = None
    """Over all stamped test images, as the field reports it: a clean one gets the target class's share."""
    clean_acc: Measure | None = None
    clean_asr: Measure | None = None
    """How often the trigger reaches the target without a backdoor: what ``asr`` is to be compared with."""
    clean_asr_all: Measure | None = None
    target: int | None = None
    target_name: str | None = None
    n_train: int
    n_test: int
    n_target: int | None = None
    """Test images of the target class."""
    probe: str
    probe_settings: dict[str, Any]
    seeds: int
    """Probes that were fitted; 1 for probes without randomness whatever was asked for."""


class _Outcome(NamedTuple):
    acc: Measure
    asr: Measure | None
    asr_all: Measure | None


def measure(hits: list[Tensor]) -> Measure:
    """Summarise, per probe seed, which test images count as hits: boolean ``[N]``, ``N >= 1``, equal N.

    One seed gives the Wilson interval, several give the t interval over seeds (cut to [0, 1]), both at 95 %.
    """
    shares, n = [float(hit.double().mean()) for hit in hits], len(hits[0])
    mean = float(np.mean(shares))
    if len(shares) == 1:
        low, high = stats.binomtest(int(hits[0].sum()), n).proportion_ci(method="wilson")
        return Measure(mean=mean, std=None, low=low, high=high, interval="wilson", per_seed=shares, n=n)
    std = float(np.std(shares, ddof=1))
    half = float(stats.t.ppf(0.975, len(shares) - 1)) * std / len(shares) ** 0.5
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Measure(mean=mean, std=std, low=low, high=high, interval="student-t", per_seed=shares, n=n)


def evaluate_encoder(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    *,
    run: Run,
    probe: str | Probe = "mlp",
    trigger: Trigger | None = None,
    target: int | None = None,
    clean_encoder: Encoder | None = None,
    seeds: int = 1,
) -> Evaluation:
    """Fit probes on clean training features; measure ACC on clean and ASR on stamped test images.

    Args:
        encoder: the one to judge; unchanged.
        train: labelled images for the probe.
        test: labelled images of the same classes; at least one is not of the target class.
        run: random streams, device, precision, progress.
        probe: a probe or a name for ``make_probe``.
        trigger: the attacker's; without it only ACC is measured.
        target: the label that the attacker aims at (see ``target_of_reference``); needed with a trigger.
        clean_encoder: measured likewise, with probes of its own from the same seeds.
        seeds: probes to fit, if the probe is random at all.

    Raises:
        ImageError: no labels, differing classes, an empty set, or only images of the target class.
        SettingError: a trigger without target or the reverse, a target outside the classes, ``seeds < 1``.
        NonFiniteError: features or the probe's loss are not finite.
    """
    classes = _common_classes(train, test)
    attack = _checked_attack(test, trigger, target, classes)
    if seeds < 1:
        raise SettingError(f"The number of probe seeds must be at least 1, found {seeds}.")
    chosen = make_probe(probe) if isinstance(probe, str) else probe
    runs = [run.child("seed", i) for i in range(seeds if chosen.stochastic else 1)]

    def outcome(model: Encoder) -> _Outcome:
        return _outcome(model, train, test, chosen, attack, classes, runs)

    own, names = outcome(encoder), train.classes or test.classes
    clean = None if clean_encoder is None else outcome(clean_encoder)
    return Evaluation(
        acc=own.acc,
        asr=own.asr,
        asr_all=own.asr_all,
        clean_acc=clean and clean.acc,
        clean_asr=clean and clean.asr,
        clean_asr_all=clean and clean.asr_all,
        target=target,
        target_name=names[target] if target is not None and names else None,
        n_train=len(train),
        n_test=len(test),
        n_target=None if target is None else int((_labels(test) == target).sum()),
        probe=chosen.name,
        probe_settings=chosen.settings(),
        seeds=len(runs),
    )


def _outcome(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    probe: Probe,
    attack: tuple[Trigger, int] | None,
    classes: int,
    runs: list[Run],
) -> _Outcome:
    labels = _labels(test)
    known = extract(encoder, train, run=runs[0])
    fitted = [probe.fit(known, _labels(train), classes=classes, run=run) for run in runs]
    clean = extract(encoder, test, run=runs[0])
    acc = measure([classifier.predict(clean) == labels for classifier in fitted])
    if attack is None:
        return _Outcome(acc, None, None)
    trigger, target = attack
    stamped = extract(encoder, test, run=runs[0], trigger=trigger)
    hits = [classifier.predict(stamped) == target for classifier in fitted]
    return _Outcome(acc, measure([hit[labels != target] for hit in hits]), measure(hits))


def target_of_reference(encoder: Encoder, classifier: Classifier, reference: Tensor) -> int:
    """The label that a fitted probe gives to the attacker's reference image: the label a backdoor leads to.

    It may differ from the class that the attacker meant; then the attack fails for that downstream user.
    The probe is usually the one of the clean encoder.

    Args:
        encoder: whose features the classifier was fitted on; unchanged.
        classifier: from ``Probe.fit``.
        reference: uint8 ``[3, H, W]``.

    Raises:
        ImageError: another shape or type.
    """
    if reference.dtype != torch.uint8 or reference.ndim != 3 or reference.shape[0] != 3:
        raise ImageError(
            "A reference image must be uint8 of shape [3, H, W], "
            f"found {reference.dtype} of shape {list(reference.shape)}."
        )
    with evaluating(encoder), torch.no_grad():
        features = encoder(reference.to(encoder.mean.device)[None].float() / 255)
    return int(classifier.predict(features.cpu())[0])


def _labels(images: ImageSet) -> Tensor:
    if images.labels is None:
        raise ImageError(f"Evaluation needs labels, but {images.name} has none; give a labelled image set.")
    return images.labels


def _common_classes(train: ImageSet, test: ImageSet) -> int:
    """How many classes both sets have; names are compared where both have them."""
    highest, names = int(_labels(train).max()), train.classes or test.classes
    count = len(names) or highest + 1
    if (test.classes and test.classes != names) or max(highest, int(_labels(test).max())) >= count:
        raise ImageError(
            "Training and test images must have the same classes, "
            f"but {train.name} has {_described(train)} and {test.name} has {_described(test)}."
        )
    return count


def _described(images: ImageSet) -> str:
    if not images.classes:
        return f"labels up to {int(_labels(images).max())}"
    return f"{len(images.classes)} ({', '.join(images.classes[:4])}{', ...' * (len(images.classes) > 4)})"


def _checked_attack(
    test: ImageSet, trigger: Trigger | None, target: int | None, classes: int
) -> tuple[Trigger, int] | None:
    if trigger is None and target is None:
        return None
    if trigger is None:
        raise SettingError("A target label means nothing without a trigger; pass --trigger too, or neither.")
    if target is None:
        raise SettingError(
            "A trigger was given but no target label, and only the attacker knows which one is meant: "
            "pass --target, or the label of the reference image (target_of_reference finds it)."
        )
    if not 0 <= target < classes:
        raise SettingError(f"The target label must lie in 0..{classes - 1}, found {target}.")
    if bool((_labels(test) == target).all()):
        raise ImageError(
            f"All {len(test)} images of {test.name} are of the target class {target}, so no attack can be "
            "measured; give test images of other classes too."
        )
    return trigger, target
