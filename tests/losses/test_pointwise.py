"""Losses position by position, against what their formulas give by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnguide.errors import InputError
from attnguide.losses.pointwise import L1, MSE, PPCE, InsideOutside, Outside, Pointwise

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


def test_inside_and_outside_have_weights_of_their_own() -> None:
    unit = MAPS.clamp(min=0) / MAPS.amax(dim=(1, 2), keepdim=True)
    for row in range(2):
        outside = F.mse_loss(unit[row] * (1 - PRIOR[row]), torch.zeros(2, 2))
        inside = F.mse_loss(unit[row] * PRIOR[row], PRIOR[row])
        found = InsideOutside()(MAPS[row : row + 1], PRIOR[row : row + 1])
        torch.testing.assert_close(found, (2 * outside + 0.3 * inside)[None])
    everywhere = torch.ones_like(PRIOR)
    torch.testing.assert_close(InsideOutside(inside=0, outside=4)(MAPS, everywhere), torch.zeros(2))
    with pytest.raises(InputError, match="inside=-1"):
        InsideOutside(inside=-1)
    with pytest.raises(InputError, match="nothing to compare"):
        InsideOutside(inside=0, outside=0)
