"""What an image file means as a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.masks import paint, region, write

from attnguide.errors import DataError
from attnguide.masks import (
    read_mask,
)
from attnguide.masks._levels import is_gray, read_levels


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_luminance(tmp_path, mode):
    mask = read_mask(paint(tmp_path / "a.png", region(), mode))
    assert mask.dtype == torch.float32
    assert np.array_equal(mask, region() / 255)


def test_gray_is_graded(tmp_path):
    gray = np.array([[0, 51, 255]], dtype=np.uint8)
    assert np.allclose(read_mask(paint(tmp_path / "a.png", gray)), gray / 255)
    deep = Image.fromarray(np.array([[0, 13107, 65535]], dtype=np.uint16))
    assert np.allclose(read_mask(paint(tmp_path / "b.png", deep)), gray / 255)


def test_opacity_wins_whatever_the_colour(tmp_path):
    rgba = np.zeros((1, 3, 4))
    rgba[0, :, 3] = 0, 51, 255
    assert np.allclose(read_mask(paint(tmp_path / "a.png", rgba)), [[0, 0.2, 1]])


def test_full_opacity_says_nothing(tmp_path):
    rgba = np.stack([region()] * 3 + [np.full((4, 6), 255)], axis=-1)
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", rgba)), region() / 255)


def test_transparent_palette_entry(tmp_path):
    image = Image.fromarray(region(value=1))
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image, transparency=0)), region() / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_0_and_1(tmp_path, dtype):
    image = Image.fromarray(region(value=1).astype(dtype))
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image)), region() / 255)


def test_a_file_that_is_not_an_image(tmp_path):
    with pytest.raises(DataError, match=r"a\.png"):
        read_mask(write(tmp_path / "a.png", "hello"))


GREY = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)


def test_grey_and_opacity(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_levels(tmp_path / "grey.png"), GREY / 255)
    painted = np.dstack([np.full((3, 4, 3), 200, np.uint8), GREY])
    Image.fromarray(painted).save(tmp_path / "alpha.png")
    np.testing.assert_allclose(read_levels(tmp_path / "alpha.png"), GREY / 255)


def test_labels_of_zero_and_one_are_not_nearly_black(tmp_path: Path) -> None:
    labels = (GREY > 100).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    np.testing.assert_array_equal(read_levels(tmp_path / "labels.png"), labels)


def test_what_is_gray(tmp_path: Path) -> None:
    assert [is_gray(Image.new(mode, (2, 2))) for mode in ("L", "I", "I;16", "RGB", "P", "LA")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        read_levels(tmp_path / "text.png")
