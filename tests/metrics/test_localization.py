"""How well maps point at masks, against cases by hand, and Quantus."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnguide import metrics
from attnguide.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports plotting and optional packages
    import quantus

ALL = [
    (metrics.energy_in_mask, metrics.EnergyInMask),
    (metrics.iou, metrics.IoU),
    (metrics.pointing_game, metrics.PointingGame),
    (metrics.cosine, metrics.Cosine),
    (metrics.relevance_rank, metrics.RelevanceRank),
]


def cases() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(20, 12, 14)
    for number, mask in enumerate(masks):
        mask[number % 6 : number % 6 + 5, number % 7 : number % 7 + 4] = 1
    return torch.rand(20, 12, 14, generator=generator) + 0.6 * masks, masks


@pytest.mark.parametrize(
    ("function", "theirs"),
    [
        (metrics.energy_in_mask, "RelevanceMassAccuracy"),
        (metrics.relevance_rank, "RelevanceRankAccuracy"),
        (metrics.pointing_game, "PointingGame"),
    ],
)
def test_quantus_agrees(function: Any, theirs: str) -> None:
    maps, masks = cases()
    metric = getattr(quantus, theirs)(disable_warnings=True, abs=False, normalise=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = metric(
            model=torch.nn.Identity(),
            x_batch=np.zeros((20, 1, 12, 14), dtype=np.float32),
            y_batch=np.zeros(20, dtype=int),
            a_batch=maps[:, None].numpy(),
            s_batch=masks[:, None].numpy(),
        )
    torch.testing.assert_close(
        function(maps, masks).double(),
        torch.tensor(np.array(expected, dtype=float)).flatten(),
        atol=1e-5,
        rtol=0,
    )


def test_energy_in_mask_counts_what_is_positive() -> None:
    maps = torch.tensor([[[1.0, 3.0], [-5.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert metrics.energy_in_mask(maps, mask).tolist() == [0.25, 0.0, 0.0]
    assert metrics.energy_in_mask(maps * 1e-20, mask.expand(3, 2, 2)).tolist() == [0.25, 0.0, 0.0]
    with pytest.raises(InputError, match="do not fit"):
        metrics.energy_in_mask(maps, torch.ones(3, 3))


def test_by_hand() -> None:
    maps = torch.tensor([[[0.0, 4.0], [2.0, -9.0]], [[0.0, 0.0], [0.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert metrics.iou(maps, mask).tolist() == [0.5, 0.0, 0.0]  # a flat map is above nothing
    assert metrics.iou(maps, mask, threshold=0.25).tolist() == pytest.approx([1 / 3, 0.0, 0.0])
    assert metrics.pointing_game(maps, mask).tolist() == [1.0, 0.0, 1.0]
    assert metrics.pointing_game(maps, 1 - mask).tolist() == [0.0, 0.0, 0.0]
    assert metrics.relevance_rank(maps, mask).tolist() == [0.5, 0.0, 1.0]
    assert metrics.relevance_rank(maps, torch.zeros(2, 2)).tolist() == [0.0, 0.0, 0.0]
    assert metrics.cosine(mask[None] * 7, mask).tolist() == pytest.approx([1.0])
    assert metrics.cosine(maps[1:2] * 0, mask).tolist() == [0.0]


@pytest.mark.parametrize(("function", "kind"), ALL)
def test_a_metric_is_the_mean_over_batches(function: Any, kind: Any) -> None:
    maps, masks = cases()
    metric = kind()
    for start in range(0, 20, 7):
        metric.update(maps[start : start + 7], masks[start : start + 7])
    torch.testing.assert_close(metric.compute(), function(maps, masks).mean())
    assert metric.higher_is_better


@pytest.mark.parametrize(("function", "kind"), ALL)
def test_nothing_depends_on_scale_precision_or_the_rest_of_the_batch(function: Any, kind: Any) -> None:
    maps, masks = cases()
    scores = function(maps, masks)
    torch.testing.assert_close(function(maps * 1e-12, masks), scores)
    torch.testing.assert_close(function(maps[3:4], masks[3:4]), scores[3:4])
    torch.testing.assert_close(function(maps.bfloat16(), masks), function(maps.bfloat16().float(), masks))


@pytest.mark.parametrize(("function", "kind"), ALL)
def test_bad_input(function: Any, kind: Any) -> None:
    maps, masks = cases()
    with pytest.raises(InputError, match="do not fit"):
        function(maps, masks[:3])
    maps[2, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        function(maps, masks)
    with pytest.raises(InputError, match="threshold=1"):
        metrics.iou(masks, masks, threshold=1)
