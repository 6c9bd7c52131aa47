"""Gradient refinement of many starts as one batch: which trigger of a given strength collapses most?

The inversion engine asks for the smallest trigger that meets a goal; here the strength is given and the
objective is all that counts. Starts that are behind at a rung are dropped (successive halving).
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import NonFiniteError
from encoderguard.inversion import Objective
from encoderguard.parametrisations import Parametrisation, stacked, start_all
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = ["RefinePlan", "Refined", "refine"]


@dataclass(frozen=True, kw_only=True)
class RefinePlan:
    """How long and how fast to refine."""

    steps: int = 20
    batch_size: int = 16
    """Images per step, at most all; the same for all starts."""
    learning_rate: float = 0.3
    betas: tuple[float, float] = (0.5, 0.9)
    rungs: tuple[int, ...] = (5, 10)
    """Steps after which the worse half of the running starts is dropped."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """One start that ran to the end."""

    start: int
    loss: float
    """Mean over the steps since the last rung."""
    trigger: Trigger


def refine(
    encoder: Encoder,
    pixels: Tensor,
    objective: Objective,
    parametrisation: Parametrisation[Trigger],
    starts: int,
    *,
    plan: RefinePlan,
    run: Run,
    deadline: float = float("inf"),
) -> list[Refined]:
    """Minimise the objective over all starts at once; the survivors, best first.

    Args:
        encoder: frozen, on the run's device.
        pixels: float ``[N, 3, H, W]`` in [0, 1] on the run's device.
        objective: see ``Objective``.
        parametrisation: what is optimised.
        starts: numbers 0 to ``starts - 1`` of its starts are taken.
        plan: length and schedule.
        run: precision, streams, stop signal.
        deadline: of ``time.monotonic``; whoever runs then is returned as it is.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        Stopped: the user asked to stop.
    """
    shape = (pixels.shape[-2], pixels.shape[-1])
    raws = start_all(parametrisation, starts, shape, run)
    free = [part for raw in raws for part in raw[: parametrisation.free]]
    optimizer = torch.optim.Adam(free, lr=plan.learning_rate, betas=plan.betas)
    active, sums, since = list(range(starts)), [0.0] * starts, 0
    size = min(plan.batch_size, len(pixels))
    for step in range(plan.steps):
        run.check_stop()
        chosen = run.rng.permutation(len(pixels), "batch", step)[:size].to(pixels.device)
        values = parametrisation.decode(stacked([raws[k] for k in active]))
        stamped = parametrisation.stamp(pixels[chosen], values)
        with run.autocast():
            features = encoder(stamped.flatten(0, 1))
        losses = objective(features.float().unflatten(0, stamped.shape[:2]))
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for k, loss in zip(active, losses.detach().tolist(), strict=True):
            sums[k] += loss
        since += 1
        if not bool(losses.isfinite().all()):
            raise NonFiniteError(f"The loss of the trigger search became NaN or infinite at step {step}.")
        late = time.monotonic() > deadline
        if late or (step + 1 in plan.rungs and step + 1 < plan.steps and len(active) > 1):
            active = sorted(active, key=lambda k: sums[k])
            if late:
                break
            active = sorted(active[: (len(active) + 1) // 2])
            sums, since = [0.0] * starts, 0
    best = sorted(active, key=lambda k: (sums[k], k))
    return [
        Refined(start=k, loss=sums[k] / max(1, since), trigger=_decoded(parametrisation, raws[k]))
        for k in best
    ]


@torch.no_grad()
def _decoded(parametrisation: Parametrisation[Trigger], raw: tuple[Tensor, ...]) -> Trigger:
    values = parametrisation.decode(tuple(part[None] for part in raw))
    return parametrisation.trigger(tuple(part[0] for part in values))
