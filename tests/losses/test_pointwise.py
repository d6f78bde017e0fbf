"""Losses position by position, against what their formulas give by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnguide.errors import InputError
from attnguide.losses.pointwise import L1, MSE, PPCE, Outside, Pointwise

MAPS = torch.tensor([[[4.0, -2.0], [0.0, 1.0]], [[1.0, 1.0], [3.0, 2.0]]])
PRIOR = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [1.0, 1.0]]])


def test_without_scaling_they_are_torchs() -> None:
    absolute, squared = L1(scale="none")(MAPS, PRIOR), MSE(scale="none")(MAPS, PRIOR)
    torch.testing.assert_close(absolute, F.l1_loss(MAPS, PRIOR, reduction="none").mean(dim=(1, 2)))
    torch.testing.assert_close(squared, F.mse_loss(MAPS, PRIOR, reduction="none").mean(dim=(1, 2)))
    summed = MSE(scale="none", reduction="sum")(MAPS, PRIOR)
    torch.testing.assert_close(summed, 4 * squared)


def test_right_for_the_right_reasons() -> None:
    # Σ (1 − S) · A², on attributions as they are; with masks of 0 and 1 that of Ross et al. (2017).
    loss = Outside(scale="none", reduction="sum")(MAPS, PRIOR)
    torch.testing.assert_close(loss, ((1 - PRIOR) * MAPS**2).sum(dim=(1, 2)))


def test_signs_are_kept_by_the_loss_outside() -> None:
    torch.testing.assert_close(Outside()(MAPS, PRIOR), Outside()(-3 * MAPS, PRIOR))
    nothing_outside = MAPS * (PRIOR > 0)
    assert float(Outside()(nothing_outside[1:], PRIOR[1:])) == 0


def test_cross_entropy_asks_for_evidence_inside() -> None:
    inside = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    full = PPCE()(torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), inside)
    half = PPCE()(torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), inside)
    assert float(full) == pytest.approx(0, abs=1e-5)
    assert float(half) > float(full)


def test_choices_are_checked_when_the_loss_is_made() -> None:
    for settings in (
        {"distance": "cubed", "mode": "match"},
        {"distance": "squared", "mode": "like"},
        {"distance": "squared", "mode": "match", "reduction": "max"},
        {"distance": "cross_entropy", "mode": "match", "scale": "none"},
    ):
        with pytest.raises(InputError):
            Pointwise(**settings)  # type: ignore[arg-type]
    assert repr(MSE(mode="suppress")) == "MSE(mode='suppress', scale='unit', reduction='mean')"
