"""What the pre-training methods share: one call of the training loop around a model with an encoder in it."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

from lightly.models.utils import deactivate_requires_grad
from torch import Tensor, nn

from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.methods import History, Monitor
from encoderguard.plans import Plan
from encoderguard.run import Run
from encoderguard.training import Batch, train

__all__ = ["fit", "follower", "fresh_copy", "kept"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fresh_copy(encoder: Encoder, run: Run) -> Encoder:
    """A copy to train, on the run's device."""
    return encoder.clone().to(run.device).requires_grad_(True)


def follower(module: ModuleT) -> ModuleT:
    """A copy without gradients, for a momentum encoder."""
    copied = copy.deepcopy(module)
    deactivate_requires_grad(copied)
    return copied


def fit(
    model: nn.ModuleDict,
    loss: Callable[[Batch], dict[str, Tensor]],
    images: ImageSet,
    *,
    plan: Plan,
    run: Run,
    monitor: Monitor | None,
    after_step: Callable[[int, int], object] | None = None,
    fixed: Sequence[nn.Parameter] = (),
) -> History:
    """Train ``model``, whose entry ``encoder`` is what the monitor measures; arguments as ``train``."""
    student = model["encoder"]
    assert isinstance(student, Encoder)

    def measure(epoch: int) -> dict[str, float]:
        if monitor is None or epoch % monitor.every:
            return {}
        return monitor(student)

    return train(
        model,
        loss,
        images,
        plan=plan,
        run=run,
        task="pre-training",
        after_step=after_step,
        monitor=measure,
        fixed=fixed,
    )


def kept(module: nn.Module) -> dict[str, Tensor]:
    """A module's state on the CPU, to be stored beside the encoder."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
