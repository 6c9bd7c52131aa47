"""The records as pydantic models.

Numbers that are NaN or infinite become null and are named in ``nonfinite``: nothing turns wrong silently.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

__all__ = [
    "RECORDS",
    "SCHEMA_VERSION",
    "AttackRecord",
    "DemoRecord",
    "EncoderFacts",
    "EvaluateRecord",
    "FilterRecord",
    "ImageFacts",
    "PoisonRecord",
    "PretrainRecord",
    "PurifyRecord",
    "Record",
    "ScanRecord",
]

SCHEMA_VERSION = 1

Values: TypeAlias = dict[str, JsonValue]
Curves: TypeAlias = dict[str, list[float | None]]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null"
    )

    @model_validator(mode="before")
    @classmethod
    def _make_encodable(cls, data: Any) -> Any:
        """Names of files may hold bytes that are not UTF-8; JSON cannot."""
        return _encodable(data)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value


class EncoderFacts(_Part):
    """Which encoder, exactly."""

    spec: str | None = None
    """As it was asked for; None for an object that Python code passed in."""
    fingerprint: str
    """sha256 over weights, architecture and preprocessing."""
    architecture: str
    width: int | None = None
    stem: str | None = None
    input_size: int | None = None
    """Side in pixels that images are resized to inside the encoder; None takes them as they are."""
    mean: list[float] = []
    std: list[float] = []


class ImageFacts(_Part):
    """Which images, exactly."""

    spec: str | None = None
    name: str
    count: int
    """Images used."""
    available: int
    """Images that the set holds; ``count`` of them were drawn with the seed."""
    digest: str
    """Of the pixels that were used, in order."""
    height: int
    width: int
    labelled: bool = False
    skipped: list[str] = []
    """Unreadable files that were left out on request."""


class Record(_Part):
    """What every job records. Fields of a job that failed before they were known are null."""

    schema_version: int = SCHEMA_VERSION
    job: str
    status: Literal["success", "error", "interrupted"] = "success"
    error: str | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When the run began, ISO 8601, UTC."""
    seconds: float | None = None
    """Wall clock of the whole job, loading included."""
    method_seconds: float | None = None
    """Wall clock of the method alone."""
    resumed: bool = False
    """Whether the run continued an unfinished one, whose seconds and memory are not counted."""
    peak_memory_bytes: int | None = None
    """Largest resident size of the process during the job (since the process began, where the system is not
    Linux); of several processes that trained, of the first."""
    peak_device_memory_bytes: int | None = None
    """Largest amount of accelerator memory held by tensors; None on the CPU."""
    method: str | None = None
    settings: Values = {}
    """All settings of the method in effect."""
    settings_passed: Values = {}
    """Those that the caller gave, as given."""
    seed: int = 0
    device: str = "cpu"
    device_name: str | None = None
    devices: int = 1
    """Processes that shared each training step, one per device."""
    precision: str | None = None
    threads: int | None = None
    encoder: EncoderFacts | None = None
    """The encoder that the job was given."""
    images: ImageFacts | None = None
    folder: str | None = None
    """Where the files were written, as given."""
    outputs: dict[str, str] = {}
    """File name in the folder to sha256."""
    report: str | None = None
    """File name of the page made from this record."""
    versions: dict[str, str] = {}
    commit: str | None = None
    """Of the source checkout that ran, if it was one."""
    dirty: bool | None = None
    """Whether that checkout's package differed from the commit."""
    platform: str | None = None
    cpu: str | None = None
    command: list[str] | None = None
    """The command line; None when called from Python."""
    warnings: list[str] = []
    nonfinite: dict[str, str] = {}
    """Fields (dotted path) that are null because they were ``nan``, ``inf`` or ``-inf``."""

    @model_validator(mode="before")
    @classmethod
    def _name_nonfinite(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        found: dict[str, str] = {}
        cleaned = {key: _finite(value, str(key), found) for key, value in data.items()}
        return cleaned | {"nonfinite": {**dict(data.get("nonfinite", {})), **found}}


class PretrainRecord(Record):
    """A freshly pre-trained encoder."""

    job: Literal["pretrain"] = "pretrain"
    result_encoder: EncoderFacts | None = None
    history: Curves = {}


class AttackRecord(Record):
    """A backdoored encoder, for testing detectors and defenses."""

    job: Literal["attack"] = "attack"
    result_encoder: EncoderFacts | None = None
    downstream: ImageFacts | None = None
    """The attacker's labelled downstream training images, if the reference was chosen among them."""
    target: int | None = None
    """The label that the attacker aims at."""
    references: list[Values] = []
    """Source, label and digest of each reference image."""
    evidence: Values = {}
    history: Curves = {}


class PoisonRecord(Record):
    """A poisoned training set, for testing detectors, defenses and filters. ``images`` is the clean set."""

    job: Literal["poison"] = "poison"
    target: int | None = None
    """The label that the attacker aims at."""
    target_name: str | None = None
    reference_images: ImageFacts | None = None
    """Pictures of the class aimed at, if they came from a set of their own."""
    poisoned_images: ImageFacts | None = None
    trigger: Values | None = None
    """Kind and digest of what sets the backdoor off at test time."""
    rate: Values = {}
    """``asked``, ``achieved``, ``of`` (what it is a share of), ``denominator``, ``poisons``."""
    counts: dict[str, int] = {}
    """Pictures in the set, replaced, appended, with another label, with another caption."""


class ScanRecord(Record):
    """A detector's answer: a behavioural indicator, never a proof that an encoder is harmless."""

    job: Literal["scan"] = "scan"
    detector: str | None = None
    verdict: Literal["backdoored", "clean", "inconclusive"] | None = None
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    evidence: Values = {}


class PurifyRecord(Record):
    """A purified encoder."""

    job: Literal["purify"] = "purify"
    defense: str | None = None
    result_encoder: EncoderFacts | None = None
    fidelity: Values = {}
    """How alike the purified encoder and its teacher see clean images; ``source`` says which images."""
    evidence: Values = {}
    history: Curves = {}

    @property
    def unchanged(self) -> bool:
        """Whether the suspect itself came back: nothing was found in it, or the training broke off."""
        before, after = self.encoder, self.result_encoder
        return before is not None and after is not None and before.fingerprint == after.fingerprint


class FilterRecord(Record):
    """A training set ranked by suspicion. ``images`` is the whole set, ``encoder`` was trained on it."""

    job: Literal["filter"] = "filter"
    top: int | None = None
    """Images that are dropped: the most suspicious ones."""
    kept: int | None = None
    """Images that remain."""
    most_suspicious: list[int] = []
    """Indices of the first of them, most suspicious first; ``ranking.json`` has all."""
    evidence: Values = {}


class EvaluateRecord(Record):
    """ACC and ASR of an encoder downstream. ``images`` are those the probe was trained on."""

    job: Literal["evaluate"] = "evaluate"
    test_images: ImageFacts | None = None
    clean_encoder: EncoderFacts | None = None
    trigger: Values | None = None
    """Source and digest of the trigger; None without one."""
    target: int | None = None
    target_name: str | None = None
    seeds: int | None = None
    """Probes that were fitted."""
    acc: Fraction | None = None
    asr: Fraction | None = None
    """Over test images of other classes than the target; None without a trigger."""
    asr_all: Fraction | None = None
    """Over all test images."""
    clean_acc: Fraction | None = None
    clean_asr: Fraction | None = None
    clean_asr_all: Fraction | None = None
    intervals: Values = {}
    """Per measure: mean, standard deviation, 95 % interval and its kind, value per probe seed, images."""
    counts: dict[str, int | None] = {}
    """Training images, test images, test images of the target class."""


class DemoRecord(Record):
    """The main job told once per seed. Per encoder: means over seeds, ``NAME_seeds`` the single values."""

    job: Literal["demo"] = "demo"
    clean: Values = {}
    """verdict, score, threshold, acc, asr, asr_all of the clean encoder under the attacker's trigger."""
    backdoored: Values = {}
    purified: Values = {}
    recipe: Values = {}
    target: int | None = None
    trigger: Values = {}
    seeds: int | None = None
    beta: list[float] | None = None
    """MIMIC's weight per stage, first seed."""
    fidelity: Values = {}
    """Of the purified encoder to the backdoored one, first seed."""
    profiles: list[Values] = []
    """Dependence of the backdoored encoder's stages on its features, clean inputs, first seed."""
    profiles_triggered: list[Values] = []
    """The same for triggered inputs; the defense never sees these."""
    runs: list[Values] = []
    """Per seed: the numbers of each encoder, seconds per step, the attacker's confidence in the reference."""


RECORDS: dict[str, type[Record]] = {
    "attack": AttackRecord,
    "demo": DemoRecord,
    "evaluate": EvaluateRecord,
    "filter": FilterRecord,
    "poison": PoisonRecord,
    "pretrain": PretrainRecord,
    "purify": PurifyRecord,
    "scan": ScanRecord,
}
"""Record class per job; a new job adds its class here."""


def _finite(value: Any, path: str, found: dict[str, str]) -> Any:
    """``value`` with null for every NaN and infinity, whose dotted paths go into ``found``."""
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        found[path] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{path}.{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{place}", found) for place, item in enumerate(value)]
    return value
