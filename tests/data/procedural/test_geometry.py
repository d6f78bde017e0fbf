"""Curves and outlines, against what geometry says of them."""

from __future__ import annotations

import numpy as np
import pytest

from attnguide.data.procedural import _geometry as geometry


def area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def test_an_ellipse_has_its_area_and_centre() -> None:
    outline = geometry.ellipse(3, -1, 2, 0.5, points=400)
    assert area(outline) == pytest.approx(np.pi, rel=1e-3)
    np.testing.assert_allclose(outline.mean(axis=0), (3, -1), atol=1e-9)


@pytest.mark.parametrize("closed", [False, True])
def test_smooth_curves_go_through_their_points(closed: bool) -> None:
    points = np.random.default_rng(0).random((6, 2))
    curve = geometry.smooth(points, closed=closed, steps=5)
    np.testing.assert_allclose(curve[::5][:6], points, atol=1e-12)
    assert len(curve) == (30 if closed else 26)


def test_points_on_a_line_stay_on_it() -> None:
    line = np.stack([np.arange(5.0), 2 * np.arange(5.0) + 1], axis=1)
    curve = geometry.smooth(line)
    np.testing.assert_allclose(curve[:, 1], 2 * curve[:, 0] + 1)


def test_normals_are_unit_vectors_that_point_up() -> None:
    angle = np.linspace(0.2, np.pi - 0.2, 60)
    for curve in (np.stack([np.cos(angle), -np.sin(angle)], 1), np.stack([-np.cos(angle), np.sin(angle)], 1)):
        up = geometry.normals(curve)
        np.testing.assert_allclose(np.linalg.norm(up, axis=1), 1, atol=1e-6)
        assert (up[:, 1] < 0).all()  # rows count downwards
        # The normal of a circle is its radius.
        np.testing.assert_allclose(np.abs((up * curve).sum(axis=1)), 1, atol=1e-2)


def test_a_stroke_has_its_width() -> None:
    line = np.stack([np.linspace(0, 4, 9), np.zeros(9)], axis=1)
    outline = geometry.stroke(line, 0.3, 0.2)
    assert area(outline) == pytest.approx(4 * 0.5)
    assert geometry.swell(9)[[0, 4, 8]] == pytest.approx([0, 1, 0], abs=1e-12)
