"""Features of a whole image set: batches through an encoder in eval mode, without gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from encoderguard.encoder import Encoder
from encoderguard.errors import NonFiniteError
from encoderguard.images import ImageSet
from encoderguard.methods import require_images
from encoderguard.modules import evaluating
from encoderguard.random import Rng
from encoderguard.run import Run
from encoderguard.triggers import Trigger

__all__ = ["Augment", "extract", "extract_stages"]

Augment = Callable[[Tensor], Tensor]
"""Maps ``[N, 3, H, W]`` in [0, 1] to the same."""


def extract(
    encoder: Encoder,
    images: ImageSet,
    *,
    run: Run,
    batch_size: int = 256,
    trigger: Trigger | None = None,
    augment: Augment | None = None,
) -> Tensor:
    """Features of every image, float32 ``[N, D]`` on the CPU, in the order of the set.

    Args:
        encoder: unchanged; a copy is used if it is not on the run's device.
        images: N images.
        run: device, precision, progress and stop signal.
        batch_size: images per forward pass; the result does not depend on it beyond rounding.
        trigger: stamped on every image first. What it draws (places, noise) differs from image to image, and
            depends on the run's seed alone: all encoders of a comparison see the same stamped images.
        augment: applied to every (stamped) batch on the device.

    Raises:
        ImageError: the set is empty, or the trigger does not fit its images.
        NonFiniteError: a feature is NaN or infinite.
        Stopped: the user asked to stop.
    """
    parts: list[Tensor] = []
    with _on_device(encoder, run) as model:
        for batch in _batches(images, run, batch_size, trigger, augment):
            with run.autocast():
                features = model(batch)
            parts.append(features.float().cpu())
    return _finite(torch.cat(parts), images)


def extract_stages(
    encoder: Encoder,
    images: ImageSet,
    *,
    run: Run,
    batch_size: int = 256,
    trigger: Trigger | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Features ``[N, D]`` and K stage maps averaged over space ``[N, C_k]``, shallow to deep.

    All are float32 on the CPU; arguments and errors are those of ``extract``.
    """
    parts: list[list[Tensor]] = []
    with _on_device(encoder, run) as model:
        for batch in _batches(images, run, batch_size, trigger, None):
            with run.autocast():
                features, maps = model.features_and_stages(batch)
            parts.append([part.cpu() for part in (features.float(), *(m.float().mean((2, 3)) for m in maps))])
    features, *stages = (_finite(torch.cat(part), images) for part in zip(*parts, strict=True))
    return features, stages


@contextmanager
def _on_device(encoder: Encoder, run: Run) -> Iterator[Encoder]:
    model = encoder if encoder.mean.device == run.device else encoder.clone().to(run.device)
    with evaluating(model), torch.no_grad():
        yield model


def _batches(
    images: ImageSet, run: Run, batch_size: int, trigger: Trigger | None, augment: Augment | None
) -> Iterator[Tensor]:
    require_images(images, 1, "Extracting features")
    done, drawing = 0, Rng(run.rng.seed).generator("trigger")  # one for all batches: no place comes twice
    for cpu_batch in images.float_batches(batch_size):
        run.check_stop()
        batch = cpu_batch.to(run.device)
        batch = batch if trigger is None else trigger(batch, drawing)
        yield batch if augment is None else augment(batch)
        done += len(batch)
        run.progress("extract features", done, len(images))


def _finite(features: Tensor, images: ImageSet) -> Tensor:
    finite = features.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        count = len(finite) - int(finite.sum())
        raise NonFiniteError(
            f"The features of {count} of {len(finite)} images of {images.name} are not finite."
        )
    return features
