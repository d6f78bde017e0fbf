"""Quality of predictions: over all samples, for rare attributes, and in the worst group.

Functions of logits and labels, and a `Metric` of torchmetrics for each, which syncs across processes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from attnguide.errors import InputError

__all__ = [
    "AveragePrecision",
    "BalancedAccuracy",
    "WorstGroupAccuracy",
    "average_precision",
    "balanced_accuracy",
    "classification_error",
    "group_accuracy",
]


def classification_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong predictions, for each attribute.

    Args:
        scores: Logits `(N, K)`; above 0 an attribute is predicted present.
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1].

    Raises:
        InputError: If the shapes differ, there is no sample, or a label is neither 0 nor 1.
    """
    truth = _checked(scores, labels)
    return ((scores > 0) != truth).float().mean(dim=0)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the steps of precision over recall, for each attribute.

    The mean, over the samples with the attribute, of the precision among samples with at least the same
    score; samples of equal scores count together, as in scikit-learn.

    Args:
        scores: `(N, K)`, higher for "present".
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1]; NaN for an attribute that no sample has.

    Raises:
        InputError: If the shapes differ, there is no sample, or a label is neither 0 nor 1.
    """
    truth = _checked(scores, labels).double()
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked, sorted_scores = truth.gather(0, order), scores.gather(0, order)
    hits = ranked.cumsum(dim=0)
    rank = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.double)[:, None]
    # Where scores tie, precision is that at the last of them.
    last = torch.ones_like(truth, dtype=torch.bool)
    last[:-1] = sorted_scores[:-1] != sorted_scores[1:]
    at_last = torch.where(last, hits / rank, torch.zeros_like(hits))
    place = torch.where(last, rank, torch.full_like(rank, len(scores)).expand_as(hits))
    following = place.flip(0).cummin(dim=0).values.flip(0).long() - 1
    precision = at_last.gather(0, following)
    return ((precision * ranked).sum(dim=0) / truth.sum(dim=0)).float()


def balanced_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean of the accuracies among the samples with and without an attribute, for each attribute.

    Args:
        scores: Logits `(N, K)`; above 0 an attribute is predicted present.
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1]; NaN for an attribute that all samples have, or none.

    Raises:
        InputError: If the shapes differ, there is no sample, or a label is neither 0 nor 1.
    """
    truth = _checked(scores, labels)
    predicted = scores > 0
    with_attribute = (predicted & truth).sum(dim=0) / truth.sum(dim=0)
    without = (~predicted & ~truth).sum(dim=0) / (~truth).sum(dim=0)
    return (with_attribute + without) / 2


def group_accuracy(predicted: Tensor, labels: Tensor, groups: Tensor, count: int | None = None) -> Tensor:
    """Accuracy in each group, for example with and without a shortcut, or by camera.

    The lowest is the worst-group accuracy (Sagawa et al., ICLR 2020).

    Args:
        predicted: Predicted class indices `(N,)`, or predictions of one attribute.
        labels: True ones, `(N,)`.
        groups: Group of each sample, `(N,)`, int64, from 0.
        count: Number of groups; one more than the largest if left out.

    Returns:
        `(count,)` in [0, 1]; NaN for a group without samples.

    Raises:
        InputError: If the shapes differ, or a group is out of range.
    """
    right, total = _by_group(predicted, labels, groups, count)
    return (right / total).float()


def _by_group(predicted: Tensor, labels: Tensor, groups: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    if not predicted.shape == labels.shape == groups.shape or predicted.ndim != 1:
        raise InputError(
            f"predicted {tuple(predicted.shape)}, labels {tuple(labels.shape)} and groups "
            f"{tuple(groups.shape)} must all be (N,)."
        )
    highest = int(groups.max()) if len(groups) else -1
    count = highest + 1 if count is None else count
    if len(groups) and not 0 <= int(groups.min()) <= highest < count:
        raise InputError(f"groups lie from {int(groups.min())} to {highest}; there are {count}, from 0.")
    right = torch.zeros(count, dtype=torch.float64, device=groups.device)
    right.index_add_(0, groups, (predicted == labels).double())
    return right, torch.bincount(groups, minlength=count)


def _checked(scores: Tensor, labels: Tensor) -> Tensor:
    if scores.shape != labels.shape or scores.ndim != 2 or not len(scores):
        raise InputError(
            f"scores have shape {tuple(scores.shape)}, labels {tuple(labels.shape)}; both must be (N, K), "
            "N ≥ 1."
        )
    wrong = ~((labels >= 0) & (labels <= 1))
    if bool(wrong.any()):
        sample, attribute = wrong.nonzero()[0].tolist()
        raise InputError(
            f"label {labels[sample, attribute].item():g} of sample {sample}, attribute {attribute}, is "
            "neither 0 nor 1. Map −1/1 labels with (labels + 1) / 2, and leave out what has no label."
        )
    return labels > 0.5


class _Gathered(Metric):
    """A score that is computed from all samples together."""

    full_state_update = False
    higher_is_better = True
    function: ClassVar[Any]
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch: logits and labels `(N, K)`."""
        _checked(scores, labels)
        self.scores.append(scores.detach().float())
        self.labels.append(labels.detach().float())

    def compute(self) -> Tensor:
        """Return the score of each attribute, `(K,)`.

        Raises:
            InputError: If there was no batch.
        """
        if not len(self.scores):
            raise InputError(f"{type(self).__name__} has seen no sample.")
        values: Tensor = type(self).function(dim_zero_cat(self.scores), dim_zero_cat(self.labels))
        return values


class AveragePrecision(_Gathered):
    """[`average_precision`][attnguide.metrics.average_precision] over all batches."""

    function = staticmethod(average_precision)


class BalancedAccuracy(_Gathered):
    """[`balanced_accuracy`][attnguide.metrics.balanced_accuracy] over all batches."""

    function = staticmethod(balanced_accuracy)


class WorstGroupAccuracy(Metric):
    """Accuracy in the worst group, over all batches; groups without samples do not count.

    Args:
        groups: Number of groups.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Add a batch: predictions, labels and groups, `(N,)` each."""
        right, total = _by_group(predicted, labels, groups, len(self.right))
        self.right += right
        self.total += total

    def compute(self) -> Tensor:
        """Return the lowest accuracy of a group, a scalar; NaN before any sample."""
        accuracy = self.right / self.total
        return (
            torch.where(self.total > 0, accuracy, torch.inf).amin().float()
            if bool(self.total.any())
            else accuracy.mean().float()
        )

    @property
    def by_group(self) -> Tensor:
        """Accuracy in each group, over the samples of this process."""
        return (self.right / self.total).float()
