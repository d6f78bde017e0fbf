"""Losses of overlap: each class is its function, and has the values of its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnguide.interfaces import AlignmentLoss
from attnguide.losses.overlap import KL, Correlation, Cosine, Dice, Energy, IoU

#: Where the map is the prior itself, outside of it, and over twice its area.
PRIOR = torch.zeros(3, 2, 4)
PRIOR[:, :, :2] = 1
MAPS = torch.stack([PRIOR[0], 1 - PRIOR[0], torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Energy(), [0.0, 1.0, 0.5]),
        (Dice(), [0.0, 1.0, 1 - 2 * 4 / (4 + 8)]),
        (Cosine(), [0.0, 1.0, 1 - 0.5**0.5]),
    ],
    ids=["energy", "dice", "cosine"],
)
def test_values_by_hand(loss: AlignmentLoss, expected: list[float]) -> None:
    torch.testing.assert_close(loss(MAPS, PRIOR), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(7 * MAPS, PRIOR), loss(MAPS, PRIOR), rtol=1e-4, atol=1e-4)


def test_intersection_over_union_is_a_logarithm() -> None:
    losses = IoU()(MAPS, PRIOR)
    torch.testing.assert_close(losses[[0, 2]].neg().exp(), torch.tensor([1.0, 0.5]), rtol=1e-3, atol=1e-3)
    assert float(losses[1]) > 3
    assert bool(losses.isfinite().all())


def test_divergence_is_that_of_two_distributions() -> None:
    maps, prior = torch.rand(4, 3, 5).double() + 0.1, torch.rand(4, 3, 5).double() + 0.1
    p, q = (values.flatten(1) / values.flatten(1).sum(dim=1, keepdim=True) for values in (prior, maps))
    expected = F.kl_div(q.log(), p, reduction="none").sum(dim=1)
    torch.testing.assert_close(KL()(maps, prior), expected, rtol=1e-3, atol=1e-5)


def test_correlation_is_pearsons() -> None:
    maps, prior = torch.randn(4, 3, 5).double(), torch.rand(4, 3, 5).double()
    expected = [
        1 - float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
        for one, other in zip(maps, prior, strict=True)
    ]
    found = Correlation()(maps, prior)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(Correlation()(5 * maps + 3, prior), found)
