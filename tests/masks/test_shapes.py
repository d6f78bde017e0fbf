"""Shapes agree with other implementations, and cover their areas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pycocotools import mask as coco
from skimage.draw import polygon2mask
from tests.helpers.masks import region

from attnguide.errors import DataError
from attnguide.masks import (
    Circle,
    Polygon,
    RunLengths,
)


def star(rng, corners, centre, radius):
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.4, 1, corners) * radius
    x, y = centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)
    return np.stack([x, y], axis=1)


def polygon(points):
    return Polygon(tuple((float(x), float(y)) for x, y in points))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools' decode
@pytest.mark.parametrize("seed", range(20))
def test_polygons_agree_with_coco_and_skimage(seed):
    rng = np.random.default_rng(seed)
    height, width = 150, 200
    points = star(rng, int(rng.integers(5, 30)), rng.uniform(40, 110, 2), rng.uniform(35, 80))
    mask = polygon(points).draw((height, width))
    # skimage puts pixel centres at whole coordinates. No random edge runs through one, so they agree exactly.
    assert np.array_equal(mask, polygon2mask((height, width), points[:, ::-1] - 0.5))
    encoded = coco.merge(coco.frPyObjects([points.ravel().tolist()], height, width))
    assert iou(mask, coco.decode(encoded).astype(bool)) >= 0.97


def test_rectangle_covers_its_area():
    assert np.array_equal(
        polygon([(1, 0), (4, 0), (4, 2), (1, 2)]).draw((4, 6)), region(columns=slice(1, 4)) > 0
    )


def test_neighbours_share_no_pixel_and_leave_no_gap():
    left = polygon([(0, 0), (3.5, 0), (2.5, 8), (0, 8)]).draw((8, 8))
    right = polygon([(3.5, 0), (8, 0), (8, 8), (2.5, 8)]).draw((8, 8))
    assert (left ^ right).all()
    assert not (left & right).any()


def test_self_intersection_is_even_odd():
    mask = polygon([(0, 0), (9, 0), (9, 9), (0, 9), (0, 0), (3, 3), (3, 6), (6, 6), (6, 3), (3, 3)]).draw(
        (9, 9)
    )
    assert mask.sum() == 81 - 9


def test_parts_outside_are_cut_off():
    assert polygon([(-1e6, -1e6), (1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)]).draw((3, 5)).all()
    assert not polygon([(10, 10), (20, 10), (20, 20)]).draw((3, 5)).any()
    assert not Circle((50, 50), 10).draw((3, 5)).any()


def test_circle_has_its_area():
    mask = Circle((50.3, 60.8), 30).draw((120, 100))
    assert mask.sum() == pytest.approx(math.pi * 30**2, rel=0.005)
    rows, columns = mask.nonzero()
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((50.3, 60.8), abs=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_agree_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2).tolist()
    mask = rng.random((height, width)) < rng.choice([0, 0.001, 0.5, 0.999, 1])
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    runs = RunLengths.parse(encoded["counts"].decode(), (height, width), "test")
    assert np.array_equal(runs.draw((height, width)), mask)
    columns = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.concatenate([[0], np.abs(np.diff(columns)).nonzero()[0], [mask.size]])
    plain = np.diff(edges).tolist()
    assert np.array_equal(RunLengths.parse(plain, (height, width), "test").draw((height, width)), mask)


def test_corrupt_run_length_strings_are_data_errors():
    rng = np.random.default_rng(0)
    good = coco.encode(np.asfortranarray(rng.random((40, 50)) < 0.2, dtype=np.uint8))["counts"].decode()
    for _ in range(300):
        characters = list(good)
        for place in rng.integers(0, len(good), 3):
            characters[place] = chr(rng.integers(32, 127))
        try:
            assert RunLengths.parse("".join(characters), (40, 50), "f").draw((40, 50)).shape == (40, 50)
        except DataError as error:
            assert str(error).startswith("f: ")  # noqa: PT017 - some changes cancel out


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
