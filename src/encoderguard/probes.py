"""Probes: small classifiers on frozen features, to measure what an encoder is worth to its users."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from encoderguard.classifiers import Classifier, KNNClassifier, LinearClassifier, MLPClassifier
from encoderguard.errors import ImageError, NonFiniteError, SettingError
from encoderguard.random import isolated
from encoderguard.run import Run

__all__ = ["PROBES", "Classifier", "KNNProbe", "LinearProbe", "MLPProbe", "Probe", "make_probe"]


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """A way to fit a classifier; its fields are its settings."""

    name: ClassVar[str]
    stochastic: ClassVar[bool]
    """Whether the seed matters. If not, repeated fits say nothing about the spread."""

    def __post_init__(self) -> None:
        """Check every setting against its annotation."""
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                checked = TypeAdapter(hints[field.name]).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise SettingError(
                    f"Setting '{field.name}' of probe '{self.name}' cannot be {value!r}: "
                    f"{reason[0].lower()}{reason[1:]}."
                ) from None
            object.__setattr__(self, field.name, checked)

    def fit(self, features: Tensor, labels: Tensor, *, classes: int, run: Run) -> Classifier:
        """Fit to features ``[N, D]`` and labels int64 ``[N]`` in ``range(classes)``.

        Raises:
            ImageError: no images, numbers that differ, labels out of range, or a single class.
            NonFiniteError: a feature, or the training loss, is NaN or infinite.
            Stopped: the user asked to stop.
        """
        _check(features, labels, classes)
        return self._fit(features.float(), labels.long(), classes, run)

    @abstractmethod
    def _fit(self, features: Tensor, labels: Tensor, classes: int, run: Run) -> Classifier: ...

    def settings(self) -> dict[str, Any]:
        """The settings in effect, as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


@final
@dataclass(frozen=True, kw_only=True)
class MLPProbe(Probe):
    """The classifier of BadEncoder (Jia et al. 2022): L2-normalised features, 512 and 256 hidden units, Adam.

    The defaults are the paper's, but shuffled: its code keeps the stored order (see ``reference``). The last
    epoch counts, never the best on test images. One core takes 400 to 700 steps of 64 images a second, so
    500 epochs of 12,660 images need minutes: use ``quick`` where many probes are fitted.
    """

    name: ClassVar[str] = "mlp"
    stochastic: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=1)] = 500
    """Passes over the images."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per step; the last batch of an epoch may be smaller."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of Adam, constant."""
    hidden: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (512, 256)
    """Units of the two hidden layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """After the first hidden layer."""
    shuffle: bool = True
    """A new order in every epoch; without it, images that are sorted by class train badly."""

    @classmethod
    def reference(cls, **settings: Any) -> "MLPProbe":
        """As in the paper's code: no shuffling."""
        return cls(**{"shuffle": False, **settings})

    @classmethod
    def quick(cls, **settings: Any) -> "MLPProbe":
        """For small runs: fewer, larger steps; about the same accuracy in an eighth of the time."""
        return cls(**{"epochs": 100, "batch_size": 256, "learning_rate": 2e-3, **settings})

    def _fit(self, features: Tensor, labels: Tensor, classes: int, run: Run) -> Classifier:
        inputs, targets = F.normalize(features, dim=1).to(run.device), labels.to(run.device)
        order = run.rng.generator("probe", "order")
        with isolated(run.rng.integer("probe", "weights")):
            network = self._network(features.shape[1], classes).to(run.device)
            # One kernel for all parameters: at this size the optimiser costs as much as the arithmetic.
            optimiser = torch.optim.Adam(network.parameters(), lr=self.learning_rate, fused=True)
            for epoch in range(self.epochs):
                if self.shuffle:  # from the previous order: one gather per epoch instead of one per step
                    places = torch.randperm(len(inputs), generator=order).to(run.device)
                    inputs, targets = inputs[places], targets[places]
                loss = self._epoch(network, optimiser, inputs, targets, run)
                run.progress("train probe", epoch + 1, self.epochs, f"loss {loss:.3f}")
                if not math.isfinite(loss):
                    raise NonFiniteError(f"The loss of the MLP probe became {loss} in epoch {epoch + 1}.")
        return MLPClassifier(network.eval().requires_grad_(False), run.device)

    def _network(self, dim: int, classes: int) -> nn.Sequential:
        first, second = self.hidden
        return nn.Sequential(
            nn.Linear(dim, first),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, classes),
        )

    def _epoch(
        self, network: nn.Module, optimiser: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, run: Run
    ) -> float:
        """One pass; the loss of its last batch."""
        loss = inputs.new_zeros(())
        batches = (torch.split(whole, self.batch_size) for whole in (inputs, targets))
        for batch, target in zip(*batches, strict=True):
            run.check_stop()
            with run.autocast():
                logits = network(batch)
            loss = F.cross_entropy(logits.float(), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()


@final
@dataclass(frozen=True, kw_only=True)
class LinearProbe(Probe):
    """Logistic regression, fitted to convergence, on L2-normalised, then standardised features."""

    name: ClassVar[str] = "linear"
    stochastic: ClassVar[bool] = False

    inverse_regularisation: Annotated[float, Field(gt=0)] = 1.0
    """scikit-learn's C: smaller is smoother."""
    max_iterations: Annotated[int, Field(ge=1)] = 1000
    """Of L-BFGS; scikit-learn warns if they do not suffice."""

    def _fit(self, features: Tensor, labels: Tensor, classes: int, run: Run) -> Classifier:
        run.check_stop()
        run.progress("train probe", 0, 1)
        unit = F.normalize(features.double(), dim=1)
        deviation, mean = torch.std_mean(unit, dim=0, correction=0)
        # A dimension that rounding alone moves carries nothing; dividing by its deviation would blow it up.
        deviation[deviation < 1e-9] = torch.inf
        model = LogisticRegression(C=self.inverse_regularisation, max_iter=self.max_iterations)
        model.fit(((unit - mean) / deviation).cpu().numpy(), labels.cpu().numpy())
        run.progress("train probe", 1, 1)
        return LinearClassifier(model, mean, deviation, classes)


@final
@dataclass(frozen=True, kw_only=True)
class KNNProbe(Probe):
    """The ``k`` most similar training images vote with weight ``exp(cosine / temperature)`` (Wu et al. 2018).

    The usual 200 is for large sets: with few images per class a smaller ``k`` is more accurate.
    """

    name: ClassVar[str] = "knn"
    stochastic: ClassVar[bool] = False

    k: Annotated[int, Field(ge=1)] = 200
    """Voters; all images if there are fewer."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Smaller makes the nearest count more."""

    def _fit(self, features: Tensor, labels: Tensor, classes: int, run: Run) -> Classifier:
        run.check_stop()
        bank = F.normalize(features, dim=1).to(run.device)
        return KNNClassifier(bank, labels.to(run.device), classes, min(self.k, len(bank)), self.temperature)


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    if features.ndim != 2 or len(features) == 0 or labels.shape != features.shape[:1]:
        raise ImageError(
            "A probe needs features [N, D] and one label each, "
            f"found features {list(features.shape)} and labels {list(labels.shape)}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ImageError(f"Labels must lie in 0..{classes - 1}, found {low}..{high}; check the class list.")
    if low == high:
        raise ImageError(f"A probe needs images of at least two classes, but all are of class {low}.")
    if not bool(features.isfinite().all()):
        raise NonFiniteError("A probe cannot be fitted: some features are NaN or infinite.")


PROBES: dict[str, Callable[..., Probe]] = {
    "mlp": MLPProbe,
    "mlp-quick": MLPProbe.quick,
    "mlp-reference": MLPProbe.reference,
    "linear": LinearProbe,
    "knn": KNNProbe,
}


def make_probe(name: str, **settings: Any) -> Probe:
    """A probe by name (a key of ``PROBES``) with settings other than its defaults.

    Raises:
        SettingError: unknown probe, unknown setting, or a value that its annotation refuses.
    """
    if name not in PROBES:
        raise SettingError(f"Unknown probe '{name}'; expected one of: {', '.join(PROBES)}.")
    known = [field.name for field in dataclasses.fields(PROBES[name]())]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise SettingError(
            f"Unknown setting '{unknown[0]}' of probe '{name}'; expected one of: {', '.join(known)}."
        )
    return PROBES[name](**settings)
