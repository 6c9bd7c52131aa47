"""What SSLDefender unlearns: triggers, where they are from, and what is known of them."""

from typing import NamedTuple

import torch

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import History
from encoderguard.recovery import Stamp, alternating
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.triggers import MaskedPattern, Trigger

__all__ = ["Source", "known", "measured"]

_AT_ONCE = 256
"""Images per pass of what was found."""


class Source(NamedTuple):
    """Triggers to unlearn."""

    stamp: Stamp
    parts: list[tuple[dict[str, float], Stamp]]
    """Each of its parts, with what is known of it."""
    example: Trigger
    curves: History
    excess: dict[str, float] | None = None
    """See ``Suspicion``, if a search found the triggers."""


def known(given: list[Trigger], excess: dict[str, float] | None = None) -> Source:
    """Fixed triggers, in turns."""
    masks = [{"size": float(t.mask.mean())} if isinstance(t, MaskedPattern) else {} for t in given]
    return Source(alternating(given), list(zip(masks, given, strict=True)), given[0], {}, excess)


@torch.no_grad()
def measured(
    parts: list[tuple[dict[str, float], Stamp]], before: Encoder, after: Encoder, held_out: ImageSet, run: Run
) -> list[dict[str, float]]:
    """What was found, with the mean cosine of held-out images: clean, and stamped before and after."""
    rows = []
    for number, (facts, stamp) in enumerate(parts):
        drawing, seen = run.rng.generator("measured", number), []
        for begin in range(0, len(held_out), _AT_ONCE):
            chosen = range(begin, min(begin + _AT_ONCE, len(held_out)))
            pixels = (held_out.take(chosen).float() / 255).to(run.device)
            stamped = stamp(pixels, drawing)
            seen.append((before(pixels), before(stamped), after(stamped)))
        views = zip(("clean", "stamped", "stamped_after"), zip(*seen, strict=True), strict=True)
        cosines = {f"cosine_{name}": float(mean_pairwise_cosine(torch.cat(z))) for name, z in views}
        rows.append(facts | cosines)
    return rows
