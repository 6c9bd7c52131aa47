"""The processes that share the images of every training step, and what they must do together.

Each holds a copy of the model and takes its share of a step's images. Three things make N of them equal to
one: random views are drawn for the whole step and cut, batch statistics are those of the whole step, and the
loss of the step is the mean of what the processes return. A loss that compares images with one another
gathers them first (``nt_xent`` does); a mean over images needs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from encoderguard.errors import SettingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["ALONE", "Peers", "require_even_shares"]

T = TypeVar("T")
Work = Callable[[], dict[str, Tensor]]


def require_even_shares(batch_size: int, devices: int) -> None:
    """Raise SettingError unless a batch can be cut into ``devices`` equal parts."""
    if batch_size % devices:
        raise SettingError(
            f"A batch of {batch_size} images cannot be shared evenly by {devices} devices; "
            "choose a batch size that is a multiple of their number."
        )


@dataclass(frozen=True)
class Peers:
    """One process among those that train together. ``Peers()`` is a process alone, and changes nothing."""

    rank: int = 0
    """Which one this is; 0 alone writes and shows."""
    count: int = 1
    """How many there are."""
    fabric: "Fabric | None" = field(default=None, repr=False)
    """What connects them; None if there is one."""

    def share(self, whole: Tensor) -> Tensor:
        """This process's contiguous part of the first dimension.

        Raises:
            SettingError: it cannot be cut into equal parts.
        """
        require_even_shares(len(whole), self.count)
        size = len(whole) // self.count
        return whole[self.rank * size : (self.rank + 1) * size]

    def rand(self, rows: int, n: int, generator: torch.Generator, *, views: int = 1) -> Tensor:
        """Uniform draws ``[rows, n]`` for the ``n`` images here, cut out of those of the whole step.

        Args:
            rows: draws per image.
            n: images of this process; they are ``views`` stacked views of its share.
            generator: in the same state in every process; it ends where one process would leave it.
            views: how many views are stacked.
        """
        drawn = torch.rand((rows, n * self.count), generator=generator)
        return drawn.view(rows, views, self.count, -1)[:, :, self.rank].reshape(rows, n)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, without gradient."""
        if self.fabric is None:
            return values
        mean = self.fabric.all_reduce(values.detach().clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def agreed(self, value: T) -> T:
        """What the first process found; every process must ask."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def stopped(self, requested: bool, device: torch.device) -> bool:
        """Whether any process was asked to stop; every process must ask."""
        if self.fabric is None:
            return requested
        return bool(self.mean(torch.tensor(float(requested), device=device)) > 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.fabric is not None:
            self.fabric.barrier()

    def around(self, model: nn.Module) -> Callable[[Work], dict[str, Tensor]]:
        """How to call a loss so that ``backward`` leaves the gradients of the whole step in ``model``.

        They are the mean over the processes of the gradients of their terms; inside, every BatchNorm in
        training mode normalises by the whole step. The model itself is not changed.
        """
        if self.fabric is None:
            return _call
        replica = self.fabric.setup_module(_Around(model), move_to_device=False)

        def call(work: Work) -> dict[str, Tensor]:
            with _WholeBatch(self.count):
                terms: dict[str, Tensor] = replica(work)
            return terms

        return call


ALONE = Peers()


def _call(work: Work) -> dict[str, Tensor]:
    return work()


class _Around(nn.Module):
    """Data parallel wants a module whose forward pass is the whole loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Work) -> dict[str, Tensor]:
        return work()


class _WholeBatch(TorchFunctionMode):
    """Inside, ``batch_norm`` in training takes the statistics of all processes' images.

    torch's SyncBatchNorm needs CUDA and replaces modules; this leaves them alone, whoever wrote them.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        if not given.pop("training", False):
            return func(*args, **kwargs)
        return _batch_norm(self.count, **given)


def _batch_norm(
    count: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` in training over the ``[N, C, ...]`` of ``count`` processes with equal shares.

    The whole's variance is the mean of the parts' plus the variance of the parts' means.
    """
    from lightly.utils.dist import gather

    with torch.autocast(input.device.type, enabled=False):
        values = input.float()
        var, mean = torch.var_mean(values, [d for d in range(values.ndim) if d != 1], correction=0)
        parts = torch.stack(gather(torch.stack([mean, var])))
        mean = parts[:, 0].mean(0)
        var = parts[:, 1].mean(0) + (parts[:, 0] - mean).square().mean(0)
        size = count * values.numel() // values.shape[1]
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((var * (size / (size - 1))).to(running_var.dtype), momentum)
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        shift = shift if bias is None else shift + bias
        shape = [1, -1] + [1] * (values.ndim - 2)
        return torch.addcmul(shift.view(shape), values, scale.view(shape)).to(input.dtype)
