"""Shapes are drawn by one rule: a pixel is inside if its centre is."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pycocotools import mask as coco
from skimage.draw import polygon2mask

from attnguide.errors import DataError
from attnguide.masks._shapes import Circle, Polygon, RunLengths

SIZE = (17, 23)


def centres() -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)


def test_convex_polygons_are_those_of_matplotlib_and_skimage() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 6))
        corners = np.stack([11 + 9.3 * np.cos(angles), 8 + 7.1 * np.sin(angles)], axis=1)
        found = Polygon(tuple(map(tuple, corners.tolist()))).draw(SIZE)
        expected = Outline(corners).contains_points(centres()).reshape(SIZE)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found, polygon2mask(SIZE, corners[:, ::-1] - 0.5))


def test_circles_hold_the_centres_within_their_radius() -> None:
    found = Circle((11.2, 8.7), 5.3).draw(SIZE)
    expected = np.hypot(*(centres() - (11.2, 8.7)).T) <= 5.3
    np.testing.assert_array_equal(found, expected.reshape(SIZE))


def test_run_lengths_are_cocos() -> None:
    mask = np.random.default_rng(1).random(SIZE) > 0.6
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    read = RunLengths.parse(encoded["counts"].decode(), SIZE, "a file")
    np.testing.assert_array_equal(read.draw(SIZE), mask)
    np.testing.assert_array_equal(RunLengths.parse(list(read.counts), SIZE, "a file").draw(SIZE), mask)
    for wrong, message in (
        ([3], "add up to 3"),
        ([-1, 392], "integers from 0"),
        ("\x00", "corrupt"),
        ("o", "middle"),
    ):
        with pytest.raises(DataError, match=message):
            RunLengths.parse(wrong, SIZE, "a file")
