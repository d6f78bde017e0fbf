"""Values that mean "inside"."""

from __future__ import annotations

import numpy as np
import pytest

from attnguide.errors import InputError
from attnguide.masks import InsideValues, as_inside


def test_values() -> None:
    assert as_inside(15) == InsideValues(ranges=((15, 15),))
    assert as_inside(np.arange(1, 3)) == as_inside("1, 2") == InsideValues(ranges=((1, 1), (2, 2)))
    assert as_inside(["1-20", "#Ff0000"]) == InsideValues(ranges=((1, 20),), colors=(0xFF0000,))
    assert as_inside("gray") == InsideValues(gray=True)
    assert as_inside(as_inside(3)) == as_inside(3)


@pytest.mark.parametrize("inside", ["", "red", "#ff00", -1, 1.5, "5-2", [], ["gray", 1], "1,,2", True])
def test_what_is_not_a_value(inside) -> None:
    with pytest.raises(InputError, match="inside"):
        as_inside(inside)
