"""Where a poisoner puts its patches."""

import torch

from encoderguard.errors import ImageError
from encoderguard.run import Run

__all__ = ["drawn_places"]


def drawn_places(
    count: int, shape: tuple[int, int], size: int, span: tuple[float, float], run: Run, attack: str
) -> list[tuple[int, int]]:
    """Rows and columns of the upper left corners of ``count`` patches.

    Args:
        count: how many places.
        shape: height and width of the picture.
        size: side of the patch.
        span: the whole patch lies from the first to the second of these shares of each side.
        run: for the seed.
        attack: for messages.

    Raises:
        ImageError: there is no such place.
    """
    ranges = [_starts(side, size, span, attack) for side in shape]
    generator = run.rng.generator("places")
    columns = [
        torch.randint(first, last + 1, (count,), generator=generator).tolist() for first, last in ranges
    ]
    return list(zip(*columns, strict=True))


def _starts(side: int, size: int, span: tuple[float, float], attack: str) -> tuple[int, int]:
    low, high = span
    first, last = int(low * side), int(high * side) - size
    if size > side:
        raise ImageError(
            f"The patch of {attack} has {size} pixels, but the images only {side}; use a smaller patch."
        )
    if last < first:
        raise ImageError(
            f"The patch of {attack} has {size} pixels, but from {low:g} to {high:g} of {side} pixels there "
            f"is room for {max(0, last + size - first)}; use a smaller patch or a wider range."
        )
    return first, last
