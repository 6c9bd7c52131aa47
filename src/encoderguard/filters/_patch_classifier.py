"""A few small networks that learn to tell images with one of the given patches from images without."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.errors import NonFiniteError
from encoderguard.filters._patches import paste
from encoderguard.images import ImageSet
from encoderguard.random import isolated
from encoderguard.run import Run

__all__ = ["fit_and_score"]


def fit_and_score(
    images: ImageSet,
    negatives: Tensor,
    patches: list[Tensor],
    *,
    models: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    scale: tuple[float, float],
    run: Run,
) -> tuple[Tensor, list[float]]:
    """The mean probability, over the models, that each image holds one of the patches.

    Half of every batch gets a random patch, at a random size and place; at test time images come as they are.

    Args:
        images: scored, all of them.
        negatives: int64, the images to train on.
        patches: each ``[3, h, w]`` in [0, 1].
        models: of the ensemble.
        steps: per model.
        batch_size: of both halves together.
        learning_rate: of Adam.
        scale: smallest and largest factor of a patch's side.
        run: device, streams, progress.

    Returns:
        float32 ``[N]`` in [0, 1], and the last loss of each model.
    """
    total, losses = torch.zeros(len(images)), []
    for number in range(models):
        own = run.child("model", number)
        with isolated(own.rng.integer("weights")):
            network = _network().to(run.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        loss = torch.zeros(())
        for step in range(steps):
            run.check_stop()
            batch, labels = _batch(images, negatives, patches, batch_size, scale, own, step)
            loss = F.cross_entropy(network(batch.to(run.device)), labels.to(run.device))
            if not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"The loss of the patch classifier became NaN or infinite at step {step}."
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            run.progress("learn the patches", number * steps + step + 1, models * steps)
        losses.append(float(loss.detach()))
        network.eval()
        with torch.no_grad():
            parts = [
                network(part.to(run.device)).softmax(1)[:, 1].cpu() for part in images.float_batches(512)
            ]
        total += torch.cat(parts)
    return total / models, losses


def _network() -> nn.Module:
    """Three convolutions; the largest response anywhere decides, since a patch may lie anywhere."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    )


def _batch(
    images: ImageSet,
    negatives: Tensor,
    patches: list[Tensor],
    size: int,
    scale: tuple[float, float],
    run: Run,
    step: int,
) -> tuple[Tensor, Tensor]:
    generator = run.rng.generator("batch", step)
    chosen = negatives[torch.randint(len(negatives), (size,), generator=generator)]
    pixels = images.take(chosen).float() / 255
    for k in range(size // 2):
        patch = patches[int(torch.randint(len(patches), (1,), generator=generator))]
        factor = scale[0] + (scale[1] - scale[0]) * float(torch.rand(1, generator=generator))
        side = [
            max(2, min(round(factor * s), most))
            for s, most in zip(patch.shape[1:], images.shape, strict=True)
        ]
        resized = F.interpolate(patch[None], side, mode="bilinear", align_corners=False)[0]
        pixels[k : k + 1] = paste(pixels[k : k + 1], resized, generator)
    return pixels, (torch.arange(size) < size // 2).long()
