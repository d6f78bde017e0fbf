"""Colours are mixed and converted as the standard library does it."""

from __future__ import annotations

import colorsys

import pytest

from attnguide.data.procedural import _colors as colours


def test_mixtures() -> None:
    black, orange = (0, 0, 0), (200, 100, 50)
    assert colours.mix(black, orange, 0) == black
    assert colours.mix(black, orange, 1) == orange
    assert colours.mix(black, orange, 0.5) == (100, 50, 25)
    assert colours.dim(orange, 2) == (255.0, 200, 100)


@pytest.mark.parametrize("hue", [0, 0.2, 0.5, 0.9])
def test_hues(hue: float) -> None:
    red, green, blue = (value / 255 for value in colours.hsv(hue, 0.6, 0.8))
    assert colorsys.rgb_to_hsv(red, green, blue) == pytest.approx((hue, 0.6, 0.8))


def test_each_colour_is_chosen_as_often() -> None:
    shares = [colours.pick(colours.LIPSTICKS, (index + 0.5) / 100) for index in range(100)]
    assert [shares.count(colour) for colour in colours.LIPSTICKS] == [20] * 5
