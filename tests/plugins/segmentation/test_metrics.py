"""Overlap of regions, and a loss for rare attributes, against their definitions."""

from __future__ import annotations

import pytest
import torch

from attnguide.errors import InputError
from attnguide_segmentation.attributes import attribute_table
from attnguide_segmentation.metrics import balanced_bce, region_iou, right_regions
from attnguide_segmentation.regions import REGIONS


def test_rare_attributes_weigh_as_much_as_common_ones() -> None:
    labels = torch.zeros(100, 2)
    labels[:10, 0] = labels[:50, 1] = 1
    logits = torch.zeros(100, 2, requires_grad=True)
    balanced_bce(logits, labels, labels.mean(dim=0)).backward()
    # Those with and those without pull equally hard, whatever their number.
    pulls = logits.grad
    assert pulls is not None
    assert pulls.sum(dim=0).tolist() == pytest.approx([0, 0], abs=1e-8)
    assert pulls[labels[:, 0] > 0, 0].sum().item() == pytest.approx(pulls[labels[:, 1] > 0, 1].sum().item())
    # Equally frequent answers: the usual cross entropy.
    usual = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1], labels[:, 1])
    assert balanced_bce(logits[:, 1:], labels[:, 1:], torch.tensor([0.5])).item() == pytest.approx(
        usual.item()
    )


def test_overlap_of_regions() -> None:
    truth, found = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2])
    assert region_iou(found, truth, 4).tolist()[:3] == pytest.approx([1 / 2, 2 / 3, 1])
    assert region_iou(found, truth, 4)[3].isnan()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="must agree"):
        region_iou(torch.zeros(3).long(), torch.zeros(4).long())
    with pytest.raises(InputError, match=r"prevalence of attribute 1 is 0\.0"):
        balanced_bce(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0.5, 0.0]))


def test_right_regions_are_those_that_show_an_attribute() -> None:
    table = attribute_table(["lipstick", "hat", "young", "goatee"])
    weights = torch.zeros(7, 4)
    weights[REGIONS.index("mouth"), 0] = 1
    weights[REGIONS.index("hair"), 1] = 1  # a hat lies on the background
    weights[REGIONS.index("eyes"), 3] = 1
    found = right_regions(weights, table)
    assert found[[0, 3]].tolist() == [1, 0]
    assert found[[1, 2]].isnan().all()
