"""The mean of a score over samples, across batches and processes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanMetric"]


class MeanMetric(Metric):
    """Mean of a score over samples; a torchmetrics `Metric`, which syncs across processes."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, *args: Any) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""

    def update(self, *args: Any) -> None:
        """Add a batch; takes what `score` takes."""
        scores = self.score(*args)
        self.total += scores.sum().double()
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """Return the mean so far, a scalar; NaN before any sample."""
        return (self.total / self.count).float()
