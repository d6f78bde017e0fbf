"""Sizes of masks."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.masks import paint, region

from attnguide.errors import InputError
from attnguide.masks import (
    read_mask,
)
from attnguide.masks.sizes import resize


def test_shrinking_averages_and_growing_repeats():
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert resize(mask, (1, 2)).tolist() == [[0.75, 0.0]]
    assert torch.equal(resize(mask, (4, 8)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert resize(mask, 3).shape == (3, 3)
    assert resize(mask, None) is mask


@pytest.mark.parametrize("size", [0, -1, (0, 3), (1, 2, 3), (1.5, 2), "ab"])
def test_sizes_must_be_positive_integers(tmp_path, size):
    with pytest.raises(InputError, match="size must be"):
        read_mask(paint(tmp_path / "a.png", region()), size)
