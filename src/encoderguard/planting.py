"""The one fine-tuning loop of attackers who own the encoder.

Per step there is one joint forward pass of the encoder under attack: stamped images, clean images, references
and augmented references. BatchNorm is frozen, so that this equals separate passes. The shadow set is not
augmented, so the clean encoder sees it once, before training; a reference is forwarded once per step,
whatever the batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from encoderguard.augment import SIMCLR_NO_CROP
from encoderguard.encoder import Encoder
from encoderguard.errors import ImageError, SettingError
from encoderguard.features import extract
from encoderguard.images import ImageSet
from encoderguard.losses import cosine_distance
from encoderguard.methods import History, Reference
from encoderguard.planting_terms import Features, Terms, nearest
from encoderguard.run import Run
from encoderguard.similarity import mean_pairwise_cosine
from encoderguard.training import Batch, Plan, train
from encoderguard.triggers import Trigger

__all__ = ["Pair", "Planter", "freeze_batch_norm", "pair_up"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A trigger and the references that it leads to: float ``[K, 3, H, W]`` in [0, 1]."""

    trigger: Trigger
    references: Tensor
    label: int | None = None


def freeze_batch_norm(module: Encoder) -> Encoder:
    """Train all but the affine parameters of BatchNorm; in eval mode its statistics stay too."""
    module.requires_grad_(True).eval()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.requires_grad_(False)
    return module


def pair_up(
    triggers: Sequence[Trigger], references: Sequence[Reference], shape: tuple[int, int]
) -> list[Pair]:
    """Which trigger leads to which references.

    One trigger leads to all references. Several triggers lead to one label each, in the order in which the
    labels first appear; references without labels are paired one to one.

    Raises:
        ImageError: no reference, a reference of another size, or a trigger that does not fit ``shape``.
        SettingError: several triggers, but another number of labels.
    """
    if not references:
        raise ImageError(
            "A backdoor needs at least one reference image; pass --reference, or --downstream with --target."
        )
    for reference in references:
        if tuple(reference.image.shape) != (3, *shape):
            raise ImageError(
                f"The reference image is {list(reference.image.shape)}, the shadow images are {[3, *shape]}; "
                "use images of one size (--image-size)."
            )
    keys: list[int | None] = [reference.label for reference in references]
    if len(triggers) == 1:
        groups = [list(references)]
    elif all(key is None for key in keys):
        groups = [[reference] for reference in references]
    else:
        groups = [[r for r in references if r.label == key] for key in dict.fromkeys(keys)]
    if len(groups) != len(triggers):
        raise SettingError(
            f"Each trigger needs references of its own target: there are {len(triggers)} triggers and "
            f"references of {len(groups)} targets; give as many triggers as targets."
        )
    pairs = []
    for trigger, group in zip(triggers, groups, strict=True):
        pixels = torch.stack([reference.image for reference in group]).float() / 255
        trigger(pixels)  # a trigger that does not fit is refused before any work
        pairs.append(Pair(trigger, pixels, group[0].label))
    return pairs


class Planter:
    """An encoder under attack (``victim``), its clean twin (``frozen``) and the data of the attacker."""

    def __init__(
        self,
        encoder: Encoder,
        images: ImageSet,
        pairs: Sequence[Pair],
        *,
        run: Run,
        views: int = 16,
        stages: bool = False,
    ) -> None:
        """Forward the shadow set and the references through the clean encoder, once.

        Args:
            encoder: clean; unchanged.
            images: N shadow images.
            pairs: triggers with their references.
            run: surroundings.
            views: augmented references per step; 0 for none.
            stages: whether terms see stage maps.
        """
        self.images, self.pairs, self.run, self.count, self.stages = images, pairs, run, views, stages
        self.victim = freeze_batch_norm(encoder.clone().to(run.device))
        self.frozen = encoder.frozen().to(run.device)
        self.clean = extract(self.frozen, images, run=run).to(run.device)
        self.pixels = torch.cat([pair.references for pair in pairs]).to(run.device)
        self.sizes = [len(pair.references) for pair in pairs]
        with torch.no_grad():
            self.aims = self.frozen(self.pixels)

    def fine_tune(self, terms: Terms, *, plan: Plan, memory: nn.Module | None = None) -> History:
        """Minimise the sum of ``terms`` over the victim's weights, resumable.

        Args:
            terms: the loss.
            plan: length, optimiser, learning rate.
            memory: whatever else changes from step to step (coefficients, critics); its state is part of a
                checkpoint, and it has no parameters for the plan's optimiser.
        """
        model = self.victim if memory is None else nn.ModuleDict({"victim": self.victim, "memory": memory})

        def loss(batch: Batch) -> dict[str, Tensor]:
            return terms(self.features(batch))

        return train(
            model, loss, self.images, plan=plan, run=self.run, task="planting", prepare=self.victim.eval
        )

    def features(self, batch: Batch) -> Features:
        """One joint pass of stamped images, clean images, references and augmented references."""
        n, t, v = len(batch.images), len(self.pairs), self.count
        owner = torch.arange(v, device=self.pixels.device) % len(self.pixels)
        stamped = [
            pair.trigger(batch.images, batch.rng.generator("trigger", place))
            for place, pair in enumerate(self.pairs)
        ]
        views = [SIMCLR_NO_CROP(self.pixels[owner], batch.rng.generator("reference"))] if v else []
        joint = torch.cat([*stamped, batch.images, self.pixels, *views])
        maps: list[Tensor] = []
        if self.stages:
            found, maps = self.victim.features_and_stages(joint)
        else:
            found = self.victim(joint)
        *triggered, kept, targets, seen = torch.split(found, [n] * t + [n, len(self.pixels), v])
        pooled = [torch.split(m[: (t + 1) * n].mean((2, 3), dtype=torch.float32), n) for m in maps]
        return Features(
            triggered=tuple(triggered),
            references=torch.split(targets, self.sizes),
            references_clean=torch.split(self.aims, self.sizes),
            views=seen,
            views_clean=self.aims[owner],
            images=kept,
            images_clean=self.clean[batch.indices.to(self.clean.device)],
            batch=batch,
            triggered_stages=tuple(tuple(stage[p] for stage in pooled) for p in range(t)) if maps else (),
            images_stages=tuple(stage[t] for stage in pooled),
        )

    @torch.no_grad()
    def effect(self) -> dict[str, Any]:
        """What the attacker can see without a downstream task, on a draw of 512 shadow images.

        The cosines are those of the first pair; with several, ``triggers`` lists all.
        """
        chosen = self.run.rng.permutation(len(self.images), "effect")[:512]
        sample = self.images.take(chosen).to(self.run.device).float() / 255
        victim, frozen = self.victim.eval(), self.frozen
        kept, rows = victim(sample), []
        for pair, aim_before in zip(self.pairs, torch.split(self.aims, self.sizes), strict=True):
            stamped = pair.trigger(sample)
            now, before = victim(stamped), frozen(stamped)
            aim = nearest(now, victim(pair.references.to(sample.device)))
            rows.append(
                {
                    "cosine_triggered_to_reference": 1 - float(cosine_distance(now, aim)),
                    "cosine_triggered_to_reference_clean_encoder": 1
                    - float(cosine_distance(before, nearest(before, aim_before))),
                    "cosine_among_triggered": float(mean_pairwise_cosine(now)),
                }
            )
        seen: dict[str, Any] = rows[0] | {
            "cosine_clean_to_clean_encoder": 1 - float(cosine_distance(kept, frozen(sample)))
        }
        if len(rows) > 1:
            told = [{"label": pair.label, "trigger": pair.trigger.to_dict()} for pair in self.pairs]
            seen["triggers"] = [about | row for about, row in zip(told, rows, strict=True)]
        return seen
