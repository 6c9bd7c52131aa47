"""Fitted probes: what ``Probe.fit`` returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier", "KNNClassifier", "LinearClassifier", "MLPClassifier"]

_CHUNK = 4096
"""Rows that are classified at once."""


class Classifier(ABC):
    """A fitted probe."""

    @abstractmethod
    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities, float32 ``[N, classes]`` on the CPU, of features ``[N, D]``; rows sum to 1."""

    def predict(self, features: Tensor) -> Tensor:
        """The most probable label, int64 ``[N]``; the smallest one of equals."""
        return self.probabilities(features).argmax(1)


@dataclass(frozen=True)
class MLPClassifier(Classifier):
    """A network (eval mode, on ``device``) on L2-normalised features."""

    network: nn.Sequential
    device: torch.device

    def probabilities(self, features: Tensor) -> Tensor:
        """See Classifier."""
        chunks = torch.split(F.normalize(features.float(), dim=1), _CHUNK)
        return torch.cat([self.network(chunk.to(self.device)).softmax(1).cpu() for chunk in chunks])


@dataclass(frozen=True)
class LinearClassifier(Classifier):
    """A fitted scikit-learn model on L2-normalised features, then standardised with ``[D]`` float64."""

    model: LogisticRegression
    mean: Tensor
    deviation: Tensor
    classes: int

    def probabilities(self, features: Tensor) -> Tensor:
        """See Classifier."""
        unit = F.normalize(features.double(), dim=1).to(self.mean.device)
        found = self.model.predict_proba(((unit - self.mean) / self.deviation).cpu().numpy())
        result = torch.zeros(len(features), self.classes)  # classes not trained on keep 0
        result[:, torch.from_numpy(self.model.classes_)] = torch.from_numpy(found).float()
        return result


@dataclass(frozen=True)
class KNNClassifier(Classifier):
    """Votes of the ``k`` nearest rows of ``bank``, unit vectors ``[M, D]`` with labels int64 ``[M]``."""

    bank: Tensor
    labels: Tensor
    classes: int
    k: int
    temperature: float

    def probabilities(self, features: Tensor) -> Tensor:
        """See Classifier."""
        chunks = torch.split(F.normalize(features.float(), dim=1), _CHUNK)
        return torch.cat([self._votes(chunk.to(self.bank.device)).cpu() for chunk in chunks])

    def _votes(self, queries: Tensor) -> Tensor:
        cosine, nearest = (queries @ self.bank.T).topk(self.k, dim=1)
        weights = ((cosine - cosine[:, :1]) / self.temperature).exp()  # the largest is 1: no overflow
        votes = queries.new_zeros(len(queries), self.classes).scatter_add_(1, self.labels[nearest], weights)
        return votes / votes.sum(1, keepdim=True)
