"""The clean encoders that a suspect is judged beside: bundles, or all that fit of a zoo."""

import json
import logging
from pathlib import Path

from encoderguard.encoder import Encoder
from encoderguard.errors import SettingError
from encoderguard.loading import load_encoder

__all__ = ["load_references"]

_LOG = logging.getLogger("encoderguard")
_MANIFEST = "manifest.json"


def load_references(specs: tuple[str, ...], suspect: Encoder) -> dict[str, Encoder]:
    """By name: each encoder, and of each folder of a zoo the clean encoders of the suspect's architecture.

    One that is named twice, or lies in two zoos, counts once, with a warning: it is no second encoder.

    Raises:
        EncoderError: one cannot be loaded.
        SettingError: one is of another architecture, or is the suspect itself; a zoo has none that fits, or
            its manifest cannot be read.
    """
    found: dict[str, Encoder] = {}
    for spec in specs:
        if (Path(spec) / _MANIFEST).is_file():
            found |= _of_zoo(Path(spec), suspect)
        else:
            found[spec] = _reference(spec, suspect)
    first = {encoder.fingerprint: spec for spec, encoder in reversed(found.items())}
    for spec, encoder in found.items():
        if (same := first[encoder.fingerprint]) != spec:
            _LOG.warning("The reference %s is the same encoder as %s; it counts once.", spec, same)
    return {spec: found[spec] for spec in found if spec in first.values()}


def _of_zoo(folder: Path, suspect: Encoder) -> dict[str, Encoder]:
    loaded = {str(folder / name): load_encoder(str(folder / name)) for name in _clean_bundles(folder)}
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


def _clean_bundles(folder: Path) -> list[str]:
    """The files of the clean encoders. Read as JSON, because the zoo stands above the detectors."""
    try:
        cells = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["cells"]
        clean = [cell for cell in cells if cell["status"] == "built" and cell["attack"] is None]
        return [str(cell["bundle"]) for cell in clean]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{folder / _MANIFEST} is not the manifest of a zoo ({type(error).__name__}: {error}); "
            "give the folder of a zoo, or bundles."
        ) from None


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
