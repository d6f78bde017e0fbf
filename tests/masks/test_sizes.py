"""Sizes of masks."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.masks import paint, region

from attnguide.errors import DataError, InputError
from attnguide.masks import (
    read_mask,
)
from attnguide.masks.sizes import check_fit, fits, resize


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


@pytest.mark.parametrize(
    ("mask", "image", "expected"),
    [
        ((240, 320), (240, 320), True),
        ((480, 640), (375, 500), True),
        ((128, 171), (375, 500), True),  # rounded: 170.7
        ((7, 5), (224, 160), True),
        ((3, 4), (333, 500), True),  # one pixel of so small a mask
        ((100, 103), (100, 100), False),
        ((320, 240), (240, 320), False),
        ((224, 224), (240, 320), False),
        ((333, 500), (375, 500), False),
    ],
)
def test_proportions(mask, image, expected):
    assert fits(mask, image) is expected


def test_a_mask_of_another_image_is_named():
    check_fit((7, 7), (224, 224), "a.png", "a.jpg")
    with pytest.raises(DataError, match=r"a\.png has 320×240 pixels, but a\.jpg has 240×320, .*EXIF.*Turn"):
        check_fit((240, 320), (320, 240), "a.png", "a.jpg")
    with pytest.raises(DataError, match="whole image, uncropped"):
        check_fit((200, 200), (320, 240), "a.png", "a.jpg")


def test_an_upright_mask_is_not_laid_down():
    with pytest.raises(DataError, match="it is not the mask of this image"):
        resize(torch.ones(40, 20), (20, 40))
    assert resize(torch.ones(40, 20), 30).shape == (30, 30)
