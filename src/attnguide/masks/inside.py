"""Which values of a file mean "inside", where the file does not say it by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attnguide.errors import InputError

__all__ = ["Inside", "InsideValues", "as_inside"]

_COLOR = re.compile(r"#([0-9a-fA-F]{6})")
_RANGE = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")


@dataclass(frozen=True)
class InsideValues:
    """What `inside=` says.

    Attributes:
        ranges: First and last of each range of palette indices or grey values.
        colors: Colours as 0xRRGGBB.
        gray: Whether the grey value itself, divided by the largest that the file could hold, is the mask.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    colors: tuple[int, ...] = ()
    gray: bool = False


Inside = int | str | Iterable[int | str] | InsideValues
"""Values of a file that mean "inside": palette indices or grey values (`15`), ranges of them (`"1-20"`),
colours (`"#ff0000"`), several of these in a list or with commas between them, or `"gray"` for the grey value
itself."""


def as_inside(inside: Inside) -> InsideValues:
    """Read the values that mean "inside".

    Raises:
        InputError: There are none, one is neither a number, a range nor a colour, or `"gray"` is
            one of several.
    """
    if isinstance(inside, InsideValues):
        return inside
    entries = list(inside) if isinstance(inside, Iterable) and not isinstance(inside, str) else [inside]
    texts = [part.strip() for entry in entries for part in str(entry).split(",")]
    if texts == ["gray"]:
        return InsideValues(gray=True)
    ranges: list[tuple[int, int]] = []
    colors: list[int] = []
    for text in texts:
        color, numbers = _COLOR.fullmatch(text), _RANGE.fullmatch(text)
        if color is not None:
            colors.append(int(color[1], 16))
        elif numbers is not None and int(numbers[1]) <= int(numbers[2] or numbers[1]):
            ranges.append((int(numbers[1]), int(numbers[2] or numbers[1])))
        else:
            raise InputError(
                f"inside={text!r:.40} is not a value of a mask. Give numbers such as 15, ranges such as "
                "1-20, colours such as #ff0000, several of them with commas between them, or 'gray' alone."
            )
    if not texts:
        raise InputError("inside holds no value. Give at least one, such as 1 or '#ff0000'.")
    return InsideValues(tuple(ranges), tuple(colors))
