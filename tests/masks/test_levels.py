"""How much of each pixel was painted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnguide.errors import DataError
from attnguide.masks._levels import is_grey, read_levels

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


def test_what_is_grey(tmp_path: Path) -> None:
    assert [is_grey(Image.new(mode, (2, 2))) for mode in ("L", "I", "I;16", "RGB", "P", "LA")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        read_levels(tmp_path / "text.png")
