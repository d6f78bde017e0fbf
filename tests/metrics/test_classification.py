"""How good answers are, against the definitions and scikit-learn."""

from __future__ import annotations

import pytest
import sklearn.metrics as sklearn
import torch
from torch import Tensor

from attnguide import metrics
from attnguide.errors import InputError
from attnguide.metrics import average_precision, balanced_accuracy, classification_error, group_accuracy


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that many tie.
    scores = torch.randint(-3, 4, (40, 3), generator=generator).float()
    return scores, (torch.rand(40, 3, generator=generator) < 0.4).float()


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_agrees(seed: int) -> None:
    scores, labels = drawn(seed)
    for column in range(3):
        truth, score = labels[:, column].numpy(), scores[:, column].numpy()
        expected = sklearn.average_precision_score(truth, score)
        assert average_precision(scores, labels)[column].item() == pytest.approx(expected, abs=1e-6)
        expected = sklearn.balanced_accuracy_score(truth, score > 0)
        assert balanced_accuracy(scores, labels)[column].item() == pytest.approx(expected, abs=1e-6)
        expected = 1 - sklearn.accuracy_score(truth, score > 0)
        assert classification_error(scores, labels)[column].item() == pytest.approx(expected, abs=1e-6)


def test_by_hand() -> None:
    scores, labels = torch.tensor([[3.0], [2.0], [1.0], [-1.0]]), torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert average_precision(scores, labels).item() == pytest.approx((1 + 2 / 3) / 2)
    assert balanced_accuracy(scores, labels).item() == pytest.approx(0.75)
    assert classification_error(scores, labels).item() == pytest.approx(0.25)


def test_what_no_sample_has() -> None:
    scores, labels = torch.zeros(3, 1), torch.zeros(3, 1)
    assert average_precision(scores, labels).isnan().all()
    assert balanced_accuracy(scores, labels).isnan().all()


def test_a_metric_of_parts_is_that_of_the_whole() -> None:
    scores, labels = drawn(7)
    for metric, function in (
        (metrics.AveragePrecision(), average_precision),
        (metrics.BalancedAccuracy(), balanced_accuracy),
    ):
        for part in (slice(0, 7), slice(7, 30), slice(30, None)):
            metric.update(scores[part], labels[part])
        torch.testing.assert_close(metric.compute(), function(scores, labels))
        metric.reset()
        with pytest.warns(UserWarning, match="before"), pytest.raises(InputError, match="no sample"):
            metric.compute()


def test_groups() -> None:
    predicted = torch.tensor([0, 1, 1, 0, 1, 1])
    labels, groups = torch.tensor([0, 1, 0, 0, 0, 0]), torch.tensor([0, 0, 2, 2, 2, 0])
    found = group_accuracy(predicted, labels, groups, 4)
    assert found[[0, 2]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found[[1, 3]].isnan().all()
    worst = metrics.WorstGroupAccuracy(4)
    for part in (slice(0, 2), slice(2, None)):
        worst.update(predicted[part], labels[part], groups[part])
    assert worst.compute().item() == pytest.approx(1 / 3)
    torch.testing.assert_close(worst.by_group, found, equal_nan=True)
    with pytest.warns(UserWarning, match="before"):
        assert metrics.WorstGroupAccuracy(2).compute().isnan()


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"scores have shape \(3,\)"):
        average_precision(torch.zeros(3), torch.zeros(3))
    for label in (-1.0, -100.0, torch.nan):
        labels = torch.tensor([[1.0, 0.0], [0.0, label]])
        with pytest.raises(InputError, match=r"of sample 1, attribute 1, is neither 0 nor 1"):
            metrics.balanced_accuracy(torch.randn(2, 2), labels)
    with pytest.raises(InputError, match=r"groups lie from 0 to 4; there are 3"):
        group_accuracy(torch.zeros(2), torch.zeros(2), torch.tensor([0, 4]), 3)
    with pytest.raises(InputError, match=r"must all be \(N,\)"):
        group_accuracy(torch.zeros(2), torch.zeros(3), torch.tensor([0, 1]))
