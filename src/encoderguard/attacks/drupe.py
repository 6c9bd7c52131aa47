"""DRUPE (Tao et al., IEEE S&P 2024): a backdoor that hides in the distribution of clean features."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.attacks._finetuning import Planting
from encoderguard.losses import random_directions, sliced_wasserstein2
from encoderguard.planting import Planter
from encoderguard.planting_terms import Features, collapse, effectiveness, reference_kept, utility
from encoderguard.registry import register

__all__ = ["DRUPE", "Costs", "balance", "distance", "spread", "weights"]

_RISE, _FALL = 1.25, 1.25**1.25


@register
@final
@dataclass(frozen=True, kw_only=True)
class DRUPE(Planting):
    """Spreads references, shares triggered images among them, moves these into the clean distribution.

    With s_ik the cosine of triggered image i and reference k: L0, L1, L2 are BadEncoder's, L3 the mean cosine
    among references, sigma the deviation over k of mean_i s_ik, S the mean cosine among triggered images, and
    W the sliced Wasserstein distance of triggered and clean features, not normalised, over the mean deviation
    of a clean feature. The first epoch minimises L1 + L2 + .5 L3, the next three L0 + L1 + L2 + 2 sigma, all
    others L0 + L1 + L2 + c (sigma + S) + c1 W + .5 sigma (2 sigma above .1); L3 counts as long as it is
    above .4. After epoch 20 c and c1 rise by a quarter after each epoch in which the attack holds, else fall.

    Weights, thresholds and order follow the authors' code, as it runs for encoders of CIFAR-10. It counts a
    reference among its own neighbours in L3, and so do we, because the thresholds depend on it. Departures: S
    is over pairs of different images, where the code also divides by the self-pairs; references are augmented
    ``reference_views`` times per step instead of once per image. With one reference sigma is 0 and L3
    constant. Several targets count equally, each with its own references.
    """

    name: ClassVar[str] = "drupe"
    paper: ClassVar[str] = "Tao et al. 2024, IEEE S&P, Distribution Preserving Backdoor Attack"
    year: ClassVar[int] = 2024
    needs: ClassVar[str] = "a clean encoder, unlabelled shadow images, several reference images of the target"
    cost: ClassVar[str] = "fine-tuning"
    blind_spots: ClassVar[str] = (
        "The high learning rate of the authors' schedule costs accuracy on small or short runs."
    )

    epochs: Annotated[int, Field(ge=1)] = 120
    """Passes over the shadow set."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """Learning rate, constant."""
    c: Annotated[float, Field(ge=0)] = 0.1
    """First weight of sigma + S."""
    c1: Annotated[float, Field(ge=0)] = 0.001
    """First weight of the distribution distance W."""
    adapt_after: Annotated[int, Field(ge=0)] = 20
    """Epochs after which c and c1 begin to move."""
    directions: Annotated[int, Field(ge=1)] = 50
    """Random directions of the sliced Wasserstein distance per step."""

    def memory(self, planter: Planter) -> "Costs":
        """The two weights that move."""
        return Costs(self.c, self.c1, self.adapt_after)

    def terms(self, features: Features, memory: "Costs") -> dict[str, Tensor]:
        """The seven weighted terms; the weights follow epoch, L3, sigma and the memory."""
        epoch = features.batch.epoch + 1
        c, c1 = memory.at(epoch)
        values = _unweighted(features, self.directions)
        memory.count(values)
        shares = weights(
            epoch,
            spread=values["spread (L3)"].item(),
            imbalance=values["balance (sigma)"].item(),
            c=c,
            c1=c1,
        )
        shares["reference (L1)"] *= self.lambda1
        shares["utility (L2)"] *= self.lambda2
        return {name: shares[name] * value for name, value in values.items()}

    def evidence(self, memory: "Costs") -> dict[str, Any]:
        """Where c and c1 ended."""
        c, c1 = memory.costs.tolist()
        return {"c": c, "c1": c1}


def weights(epoch: int, *, spread: float, imbalance: float, c: float, c1: float) -> dict[str, float]:
    """The weight of each term in an epoch, counted from 1; ``spread`` is L3, ``imbalance`` is sigma."""
    main = {"effectiveness (L0)": 1.0, "reference (L1)": 1.0, "utility (L2)": 1.0}
    if epoch == 1:
        main |= {"effectiveness (L0)": 0.0, "spread (L3)": 0.3 if spread < 0.2 else 0.5}
        return main | {"balance (sigma)": 0.0, "collapse (S)": 0.0, "distance (W)": 0.0}
    main["spread (L3)"] = 1.0 if spread > 0.5 else 0.2 if spread > 0.4 else 0.0
    if epoch < 5:
        return main | {"balance (sigma)": 2.0, "collapse (S)": 0.0, "distance (W)": 0.0}
    sigma = c + 0.5 + (1.5 if imbalance > 0.1 else 0.0)
    return main | {"balance (sigma)": sigma, "collapse (S)": c, "distance (W)": c1}


def _unweighted(features: Features, directions: int) -> dict[str, Tensor]:
    pairs = list(zip(features.triggered, features.references, strict=True))
    sliced = random_directions(
        directions, features.images.shape[1], features.batch.rng.generator("directions")
    )
    return {
        "effectiveness (L0)": effectiveness(features),
        "reference (L1)": reference_kept(features),
        "utility (L2)": utility(features),
        "spread (L3)": torch.stack([spread(references) for _, references in pairs]).mean(),
        "balance (sigma)": torch.stack([balance(*pair) for pair in pairs]).mean(),
        "collapse (S)": collapse(features),
        "distance (W)": torch.stack([distance(t, features.images, sliced) for t, _ in pairs]).mean(),
    }


def spread(references: Tensor) -> Tensor:
    """L3: the mean cosine of references ``[K, D]`` over all pairs i <= j, self-pairs among them."""
    unit = F.normalize(references.float(), dim=1)
    rows, columns = torch.triu_indices(len(unit), len(unit), device=unit.device)
    return (unit[rows] * unit[columns]).sum(1).mean()


def balance(triggered: Tensor, references: Tensor) -> Tensor:
    """sigma: the deviation over references k of the mean cosine of ``triggered [N, D]`` to k; 0 for one."""
    cosines = F.cosine_similarity(triggered.float().unsqueeze(1), references.float().unsqueeze(0), dim=2)
    if len(references) == 1:
        return cosines.mean() * 0
    centred = cosines.mean(0) - cosines.mean()
    # the small constant keeps the gradient of the root finite at 0
    return (centred.square().sum() / (len(references) - 1) + 1e-12).sqrt()


def distance(triggered: Tensor, images: Tensor, directions: Tensor) -> Tensor:
    """W: sliced Wasserstein distance of two ``[N, D]`` batches over the mean deviation of a clean feature."""
    apart = (sliced_wasserstein2(triggered, images, directions) + 1e-12).sqrt()
    return apart / images.float().std(0).mean().clamp(min=1e-6)


class Costs(nn.Module):
    """c and c1; they move once per epoch, by the means of that epoch's terms."""

    costs: Tensor
    sums: Tensor
    state: Tensor
    last: Tensor

    def __init__(self, c: float, c1: float, adapt_after: int) -> None:
        """Begin with ``c`` and ``c1``, which stay for ``adapt_after`` epochs."""
        super().__init__()
        self.adapt_after = adapt_after
        self.register_buffer("costs", torch.tensor([c, c1], dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))  # S of the last batch
        self.register_buffer("state", torch.tensor([1, 0, 0]))  # epoch, its batches, whether c waits

    def at(self, epoch: int) -> tuple[float, float]:
        """C and c1 for an epoch, counted from 1; call it before each step."""
        before, count, _ = self.state.tolist()
        if epoch > before:
            if before > self.adapt_after and count:
                self._move((self.sums / count).tolist())
            self.sums.zero_()
            self.state[0], self.state[1] = epoch, 0
        c, c1 = self.costs.tolist()
        return c, c1

    def count(self, values: dict[str, Tensor]) -> None:
        """Add the unweighted terms of a step."""
        for place, name in enumerate(("effectiveness (L0)", "reference (L1)", "utility (L2)")):
            self.sums[place] += float(values[name].detach())
        self.last.fill_(float(values["collapse (S)"].detach()))
        self.state[1] += 1

    def _move(self, means: list[float]) -> None:
        # distances 1 + L0, 1 + L1, 1 + L2: the authors ask for L0 < -.96, L1 < -.9, L2 < -.9
        holds = means[0] < 0.04 and means[1] < 0.1 and means[2] < 0.1
        last, waits = float(self.last), bool(self.state[2])
        if not holds:
            self.costs[0] /= _FALL
        elif not waits:
            self.costs[0] *= _RISE
        self.costs[1] = self.costs[1] * _RISE if holds and last < 0.6 else self.costs[1] / _FALL
        # once triggered images differ enough, c pauses for an epoch
        self.state[2] = int(holds and last < 0.5)
