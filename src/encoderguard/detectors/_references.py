"""The clean encoders that a suspect is judged beside: bundles, or all that fit of a zoo."""

from pathlib import Path

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.loading import load_encoder

__all__ = ["load_references"]

_MANIFEST = "manifest.json"


def load_references(specs: tuple[str, ...], suspect: Encoder) -> dict[str, Encoder]:
    """By name: each encoder, and of each folder of a zoo the clean encoders of the suspect's architecture.

    Raises:
        EncoderError: one cannot be loaded.
        SettingError: one is of another architecture, or is the suspect itself; a zoo has none that fits.
        UsageError: the manifest of a zoo cannot be read.
    """
    found: dict[str, Encoder] = {}
    for spec in specs:
        if (Path(spec) / _MANIFEST).is_file():
            found |= _of_zoo(Path(spec), suspect)
        else:
            found[spec] = _reference(spec, suspect)
    return found


def _of_zoo(folder: Path, suspect: Encoder) -> dict[str, Encoder]:
    from encoderguard.zoo.manifest import read_manifest  # the zoo builds with jobs, which know the detectors

    clean = [entry for entry in read_manifest(folder).cells if entry.status == "built" and not entry.attack]
    known = {str(folder / str(entry.bundle)): entry for entry in clean if entry.bundle}
    loaded = {spec: load_encoder(spec) for spec in known}
    fitting = {
        spec: encoder
        for spec, encoder in loaded.items()
        if _kind(encoder) == _kind(suspect) and encoder.fingerprint != suspect.fingerprint
    }
    if not fitting:
        raise SettingError(
            f"The zoo {folder} has no clean encoder that is {_words(suspect)}, as the suspect is; "
            "give references of that kind, or ask for students."
        )
    return fitting


def _reference(spec: str, suspect: Encoder) -> Encoder:
    reference = load_encoder(spec)
    if _kind(reference) != _kind(suspect):
        raise SettingError(
            f"The reference {spec} is {_words(reference)}, the suspect is {_words(suspect)}; "
            "give clean encoders of the suspect's architecture."
        )
    if reference.fingerprint == suspect.fingerprint:
        raise SettingError(
            f"The reference {spec} is the suspect itself; give encoders that are known to be clean."
        )
    return reference


def _kind(encoder: Encoder) -> tuple[str, int, str]:
    return encoder.spec.architecture, encoder.spec.width, encoder.spec.stem


def _words(encoder: Encoder) -> str:
    architecture, width, stem = _kind(encoder)
    return f"{architecture} of width {width} with the {stem} stem"
