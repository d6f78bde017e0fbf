"""Regions: labels of data sets merge into them, and their masks are resized and scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnguide.data.procedural.faces import HELEN_LABELS
from attnguide.errors import AttnGuideError
from attnguide_segmentation.regions import REGIONS, SCHEMES, as_masks, merged, normalized, resized

MOUTH, HAIR = REGIONS.index("mouth"), REGIONS.index("hair")


def test_eleven_labels_become_seven_regions() -> None:
    assert [REGIONS[index] for index in merged(torch.arange(11))] == [
        "background", "face_skin", "eyebrows", "eyebrows", "eyes", "eyes", "nose", "mouth", "mouth", "mouth",
        "hair",
    ]  # fmt: skip
    # The drawn faces use Helen's order, word for word.
    names = [name.removeprefix("left_").removeprefix("right_") for name in HELEN_LABELS]
    same = {
        "brow": "eyebrows",
        "eye": "eyes",
        "upper_lip": "mouth",
        "inner_mouth": "mouth",
        "lower_lip": "mouth",
    }
    assert tuple(same.get(name, name) for name in names) == SCHEMES["helen"]
    assert len(SCHEMES["celebamask"]) == 19
    assert merged(torch.tensor([[9, 4]]), {4: "nose", 9: "hair"}).tolist() == [[1, 6]]


@pytest.mark.parametrize(
    ("labels", "scheme", "match"),
    [
        (torch.tensor([3, 11]), "helen", r"holds \[11\], but the labels are 0 to 10"),
        (torch.tensor([-1, 2]), "helen", r"holds \[-1\]"),
        (torch.tensor([0.5]), "helen", r"labels are torch\.float32"),
        (torch.tensor([0]), "hellen", "Did you mean 'helen'"),
        (torch.tensor([0]), ["beard"], "region 'beard'"),
    ],
)
def test_strange_labels(labels: Tensor, scheme: Any, match: str) -> None:
    with pytest.raises(AttnGuideError, match=match):
        merged(labels, scheme)


def test_masks_of_labels() -> None:
    labels = torch.randint(0, 7, (2, 5, 6), generator=torch.Generator().manual_seed(0))
    masks = as_masks(labels.byte())
    assert masks.shape == (2, 7, 5, 6)
    assert torch.equal(masks.argmax(dim=1), labels)
    assert torch.equal(masks.sum(dim=1), torch.ones(2, 5, 6))
    assert as_masks(masks) is masks


@pytest.mark.parametrize(
    ("regions", "match"),
    [
        (torch.full((1, 4, 4), 7), r"holds \[7\], but regions are 0 to 6"),
        (torch.zeros(1, 6, 4, 4), r"shape \(1, 6, 4, 4\).* masks \(B, 7, H, W\)"),
        (torch.zeros(1, 4, 4), r"float32: expected a label map"),
        (torch.full((1, 7, 2, 2), torch.nan), r"outside of \[0, 1\], or NaN"),
    ],
)
def test_strange_masks(regions: Tensor, match: str) -> None:
    with pytest.raises(AttnGuideError, match=match):
        as_masks(regions)


def test_small_parts_grow_and_large_ones_are_averaged() -> None:
    masks = torch.zeros(1, 7, 8, 8)
    masks[0, MOUTH, 0, 0] = masks[0, HAIR, 0, 0] = 1
    small = resized(masks, (2, 2))
    assert small[0, MOUTH].tolist() == [[1, 0], [0, 0]]
    assert small[0, HAIR].tolist() == [[1 / 16, 0], [0, 0]]
    assert resized(masks, (8, 8)) is masks


def test_masks_are_scaled_to_a_sum_of_one_or_stay_empty() -> None:
    masks = as_masks(torch.tensor([[[1, 1], [1, 5]]]))
    sums = normalized(masks).sum(dim=(2, 3))
    assert sums.tolist() == [[0, 1, 0, 0, 0, 1, 0]]
