"""The one training loop: batches, precision, schedule, progress, checkpoint and resume, NaN guard.

All randomness is a function of (seed, epoch) or (seed, step), so a run that was killed and resumed ends where
an unbroken one ends, bit for bit on the same machine.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoderguard.augment import Augmentation
from encoderguard.errors import EncoderError, ImageError, NonFiniteError
from encoderguard.images import ImageSet
from encoderguard.methods import History, require_images
from encoderguard.peers import ALONE, Peers, require_even_shares
from encoderguard.plans import Plan, optimizer_for
from encoderguard.random import Rng, isolated
from encoderguard.run import Run, Stopped
from encoderguard.storage import write_atomic

__all__ = ["Batch", "Plan", "train"]

_SAVE_EVERY = float(os.environ.get("ENCODERGUARD_SAVE_EVERY", "60"))  # seconds between checkpoints
_IN_MEMORY = 4 << 30  # bytes of pixels that are moved to the device once


@dataclass(frozen=True)
class Batch:
    """What a loss sees at one step."""

    images: Tensor
    """float32 ``[B, 3, H, W]`` in [0, 1] on the device."""
    indices: Tensor
    """int64 ``[B]``: their places in the image set."""
    rng: Rng
    """Streams of this step."""
    canvases: Tensor | None = None
    """Further pictures of this step that have another size: float32 ``[C, 3, H', W']``."""
    epoch: int = 0
    """The pass over the images that this step is part of, from 0."""
    peers: Peers = ALONE
    """The processes that share the step; all of the above is this process's share."""

    def views(self, augmentation: Augmentation, count: int = 2) -> list[Tensor]:
        """``count`` random views ``[B + C, 3, H, W]`` of every picture, those of canvases last."""
        generator = self.rng.generator("views")
        return [self._view(augmentation, generator) for _ in range(count)]

    def _view(self, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
        own = augmentation(self.images, generator, peers=self.peers)
        if self.canvases is None:
            return own
        size = (own.shape[-2], own.shape[-1])
        return torch.cat([own, augmentation(self.canvases, generator, size=size)])


def train(
    model: nn.Module,
    loss: Callable[[Batch], dict[str, Tensor]],
    images: ImageSet,
    *,
    plan: Plan,
    run: Run,
    task: str,
    prepare: Callable[[], object] | None = None,
    after_step: Callable[[int, int], object] | None = None,
    monitor: Callable[[int], Mapping[str, float]] | None = None,
    fixed: Sequence[nn.Parameter] = (),
    enough: Callable[[History], bool] | None = None,
) -> History:
    """Minimise the sum of the terms that ``loss`` returns over ``model``'s trainable parameters.

    Args:
        model: holds everything that is trained; it is what a checkpoint stores.
        loss: called under autocast with the images of a step; each value is one weighted scalar term. Where
            several processes share a step, the term of the step is the mean of theirs.
        images: shuffled every epoch, canvases among them; the last incomplete batch of an epoch is dropped.
        plan: length, optimiser and schedule.
        run: seed, device, precision, progress, checkpoint.
        task: shown beside the progress.
        prepare: called before each step (``model.train`` by default), to put modules into their modes.
        after_step: called with the number of finished steps and of all steps after each change of the
            weights, to move what follows them (a momentum encoder); what it moves must be part of ``model``.
        monitor: called with the number of finished epochs after each; what it measures is shown and kept in
            the history. It must leave weights, modes and random streams alone.
        fixed: parameters of ``model`` that keep the learning rate of the plan, whatever its schedule.
        enough: called with the history after each epoch; True ends the training before its planned length.

    Returns:
        The mean of each term and of ``loss`` per epoch.

    Raises:
        ImageError: fewer images than one batch, or canvases where several processes share a step.
        NonFiniteError: a loss became NaN or infinite.
        Stopped: the user asked to stop; the state is saved first.
    """
    require_images(images, plan.batch_size, task.capitalize())
    loop = _Loop(model, images, plan, run, task, fixed)
    with isolated(0):  # each step seeds the global generators anew, for dropout
        while loop.step < loop.total and not (enough and loop.between_epochs and enough(loop.history)):
            (prepare or model.train)()
            loop.apply(loop.terms(loss))
            if after_step is not None:
                after_step(loop.step, loop.total)
            loop.report(monitor)
    return loop.history


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        plan: Plan,
        run: Run,
        task: str,
        fixed: Sequence[nn.Parameter],
    ) -> None:
        self.model, self.images, self.plan, self.run, self.task = model, images, plan, run, task
        self.wide = images.canvases
        self.count = len(images) + (0 if self.wide is None else len(self.wide))
        self.per_epoch = self.count // plan.batch_size
        self.total = plan.epochs * self.per_epoch
        self.optimizer = optimizer_for(model, plan, fixed)
        self.step, self.sums, self.history = 0, dict[str, float](), History()
        self.saved = time.monotonic()
        self.pixels = _resident(images, run.device)
        self.peers = run.peers
        require_even_shares(plan.batch_size, self.peers.count)
        if self.wide is not None and self.peers.count > 1:
            raise ImageError(
                f"{images.name} has {len(self.wide)} appended canvases, which several devices cannot share; "
                "train on one device."
            )
        self._resume()
        self.around = self.peers.around(model)

    @property
    def between_epochs(self) -> bool:
        return self.step > 0 and self.step % self.per_epoch == 0

    def report(self, monitor: Callable[[int], Mapping[str, float]] | None) -> None:
        if self.between_epochs:
            for name, value in self.sums.items():
                self.history.setdefault(name, []).append(value / self.per_epoch)
            self.sums = {}
            notes = [f"loss {self.history['loss'][-1]:.4f}"]
            for name, value in self._measured(monitor).items():
                self.history.setdefault(name, []).append(value)
                notes.append(f"{name} {value:.3f}")
            self.run.progress(self.task, self.step, self.total, ", ".join(notes))
        else:
            self.run.progress(self.task, self.step, self.total)
        if self.peers.stopped(self.run.stop.requested, self.run.device):
            self._save()
            self.peers.wait()  # the first to leave ends them all
            raise Stopped
        if time.monotonic() - self.saved > _SAVE_EVERY:
            self._save()

    def _measured(self, monitor: Callable[[int], Mapping[str, float]] | None) -> Mapping[str, float]:
        if monitor is None:
            return {}
        first = self.peers.rank == 0
        return self.peers.agreed(monitor(self.step // self.per_epoch) if first else {})

    def terms(self, loss: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        epoch, place = divmod(self.step, self.per_epoch)
        size = self.plan.batch_size
        chosen = self.run.rng.permutation(self.count, "order", epoch)[place * size : (place + 1) * size]
        chosen, wide = self.peers.share(chosen), None
        if self.wide is not None:
            own = len(self.images)
            wide = self._floats(self.wide[chosen[chosen >= own] - own])
            chosen = chosen[chosen < own]
        source = self.images.take(chosen) if self.pixels is None else self.pixels[chosen.to(self.run.device)]
        rng = self.run.rng.child("step", self.step)
        batch = Batch(self._floats(source), chosen, rng, wide, epoch, self.peers)
        torch.manual_seed(rng.integer("modules", self.peers.rank))
        with self.run.autocast():
            return self.around(partial(loss, batch))

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.run.device).float().div_(255)

    def apply(self, terms: dict[str, Tensor]) -> None:
        total = torch.stack(list(terms.values())).sum()
        shown = terms | {"loss": total}
        means = self.peers.mean(torch.stack([term.detach() for term in shown.values()]))
        values = dict(zip(shown, means.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            parts = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            raise NonFiniteError(
                f"{self.task.capitalize()} broke off at step {self.step}: its loss is not finite ({parts}); "
                "lower the learning rate."
            )
        self.optimizer.param_groups[0]["lr"] = self.plan.rate(self.step, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        self.optimizer.step()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.step += 1

    def _save(self) -> None:
        path = self.run.checkpoint
        if path is None or self.peers.rank > 0:
            return
        state = {
            "task": self.task,
            "plan": self.plan.text,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomic(path, lambda part: torch.save(state, part))
        self.saved = time.monotonic()

    def _resume(self) -> None:
        path = self.run.checkpoint
        if path is None or not self.run.resume or not path.exists():
            return
        state = _read_checkpoint(path)
        if (state["task"], state["plan"]) != (self.task, self.plan.text):
            raise EncoderError(
                f"The checkpoint {path} belongs to a run with other settings: {state['plan']}."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.sums, self.history = state["step"], state["sums"], state["history"]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise EncoderError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}); remove it to start over."
        ) from None
    return state


def _resident(images: ImageSet, device: torch.device) -> Tensor | None:
    height, width = images.shape
    if len(images) * 3 * height * width > _IN_MEMORY:
        return None
    return images.take(torch.arange(len(images))).to(device)
