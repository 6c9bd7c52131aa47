"""The area under the ROC curve of a detector's scores."""

from collections.abc import Sequence

import numpy as np

__all__ = ["auroc"]

_BOOTSTRAPS = 2000


def auroc(clean: Sequence[float], bad: Sequence[float]) -> dict[str, float] | None:
    """Its ``value`` with a 95 % bootstrap interval, ``low`` and ``high``; None if either group is empty.

    Clean and backdoored encoders are drawn apart, so every draw holds both.

    Args:
        clean: scores of clean encoders; a larger score is more suspicious.
        bad: scores of backdoored encoders.
    """
    if not clean or not bad:
        return None
    own, other = np.array(bad)[:, None], np.array(clean)[None]
    wins = (own > other) + 0.5 * (own == other)  # their mean is the area (Mann and Whitney)
    random = np.random.default_rng(0)
    drawn_bad, drawn_clean = (
        random.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS) / n for n in (len(bad), len(clean))
    )
    low, high = np.quantile(((drawn_bad @ wins) * drawn_clean).sum(1), [0.025, 0.975]).tolist()
    return {"value": float(wins.mean()), "low": low, "high": high}
