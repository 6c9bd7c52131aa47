"""How faithful a purified encoder is to its source, with and without labels."""

from pydantic import BaseModel
from torch.nn import functional as F

from encoderguard.encoder import Encoder
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.methods import require_images
from encoderguard.run import Run
from encoderguard.similarity import debiased_linear_cka, neighbour_overlap

__all__ = ["Fidelity", "label_free_fidelity", "trojai_fidelity"]

_NEIGHBOURS = 10


class Fidelity(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How alike two encoders see clean images, without labels; 1 is equal in all three."""

    cosine: float | None
    """Mean cosine of the two features of one image; None if the encoders' dimensions differ."""
    cka: float
    """Debiased linear CKA."""
    neighbour_overlap: float
    """Mean share of common images among the 10 nearest."""
    n: int


def label_free_fidelity(student: Encoder, teacher: Encoder, images: ImageSet, *, run: Run) -> Fidelity:
    """Compare two encoders on clean images that neither was distilled on; labels are not looked at.

    Raises:
        ImageError: fewer images than neighbours can be drawn from.
        NonFiniteError: a feature is not finite.
    """
    require_images(images, _NEIGHBOURS + 2, "Comparing two encoders")
    x, y = extract(student, images, run=run), extract(teacher, images, run=run)
    return Fidelity(
        cosine=float(F.cosine_similarity(x, y).mean()) if x.shape == y.shape else None,
        cka=debiased_linear_cka(x, y),
        neighbour_overlap=neighbour_overlap(x, y, _NEIGHBOURS),
        n=len(images),
    )


def trojai_fidelity(
    *, asr_before: float, asr_after: float, acc_before: float, acc_after: float
) -> float | None:
    """NIST TrojAI's fidelity of a mitigation, ``(ASR0 - ASR1) / ASR0 * ACC1 / ACC0``.

    1 is a backdoor gone at no cost; it is larger if accuracy rose too, negative if the backdoor grew
    stronger, and None (undefined) if ASR0 or ACC0 is 0.
    """
    if asr_before == 0 or acc_before == 0:
        return None
    return (asr_before - asr_after) / asr_before * acc_after / acc_before
