"""Drawing polygons, circles and run lengths as masks.

All use one pixel convention: pixel (row r, column c) covers the square from (x, y) = (c, r) to
(c + 1, r + 1), and is inside a shape if its centre (c + ½, r + ½) is. It is the convention of LabelMe's and
COCO's coordinates, by which a polygon's area is on average its number of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnguide.errors import DataError
from attnguide.masks._entries import EXPORT_AGAIN

__all__ = ["Bitmap", "Circle", "Polygon", "RunLengths", "Shape"]

Mask = npt.NDArray[np.bool_]


class Shape(Protocol):
    """A part of an image."""

    def draw(self, size: tuple[int, int]) -> Mask:
        """Return the mask `(H, W)` of the shape in an image of that size; what is outside is cut off."""
        ...


@dataclass(frozen=True)
class Polygon:
    """A closed polygon, filled by the even–odd rule.

    Attributes:
        points: Corners (x, y) in pixels, at least three; the last is joined to the first.
    """

    points: tuple[tuple[float, float], ...]

    @property
    def is_flat(self) -> bool:
        """Whether all corners lie on one line, so that the polygon has no area."""
        (x0, y0), *others = self.points
        sides = [(x - x0, y - y0) for x, y in others if (x, y) != (x0, y0)]
        return all(sides[0][0] * y == sides[0][1] * x for x, y in sides)

    def draw(self, size: tuple[int, int]) -> Mask:
        """Return the mask `(H, W)`."""
        height, width = size
        # A pixel is inside if an odd number of edges lies to its left. Each edge is marked, in every row
        # whose centre it crosses, at the first pixel to its right; a running parity does the rest.
        crossings = np.zeros((height, width + 1), dtype=bool)
        for edge in zip(self.points, self.points[1:] + self.points[:1], strict=True):
            (x0, y0), (x1, y1) = sorted(edge, key=lambda point: point[1])
            first, last = np.clip(np.ceil((y0 - 0.5, y1 - 0.5)), 0, height).astype(int)
            rows = np.arange(first, last)
            if rows.size:
                x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
                columns = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
                crossings[rows, columns] ^= True
        inside: Mask = np.logical_xor.accumulate(crossings[:, :width], axis=1)
        return inside


@dataclass(frozen=True)
class Bitmap:
    """A region given pixel by pixel.

    Attributes:
        corner: Column and row of its first pixel.
        pixels: Mask `(h, w)`.
    """

    corner: tuple[int, int]
    pixels: Mask

    def draw(self, size: tuple[int, int]) -> Mask:
        """Return the mask `(H, W)`."""
        inside = np.zeros(size, dtype=bool)
        rows, columns = np.nonzero(self.pixels)
        rows, columns = rows + self.corner[1], columns + self.corner[0]
        seen = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
        inside[rows[seen], columns[seen]] = True
        return inside


@dataclass(frozen=True)
class Circle:
    """A disc.

    Attributes:
        centre: Its centre (x, y) in pixels.
        radius: Its radius in pixels.
    """

    centre: tuple[float, float]
    radius: float

    def draw(self, size: tuple[int, int]) -> Mask:
        """Return the mask `(H, W)`."""
        rows, columns = np.ogrid[: size[0], : size[1]]
        x, y = self.centre
        inside: Mask = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= self.radius**2
        return inside


@dataclass(frozen=True)
class RunLengths:
    """COCO's run-length encoding: lengths of outside and inside in turn, column by column.

    Attributes:
        counts: Lengths in pixels, outside first; together the pixels of the image.
    """

    counts: tuple[int, ...]

    def draw(self, size: tuple[int, int]) -> Mask:
        """Return the mask `(H, W)`."""
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(size[::-1]).T

    @classmethod
    def parse(cls, counts: object, size: tuple[int, int], where: str) -> RunLengths:
        """Check the counts of a file.

        Args:
            counts: A list of counts, or COCO's compressed string.
            size: Height and width of the image.
            where: File and entry, for errors.

        Raises:
            DataError: They are not counts, or do not add up to the image.
        """
        if isinstance(counts, str):
            counts = _decompress(counts, where)
        pixels = size[0] * size[1]
        if not isinstance(counts, list) or not all(type(n) is int and 0 <= n <= pixels for n in counts):
            raise DataError(
                f"{where}: RLE counts must be a string or a list of integers from 0 to {pixels}, the "
                f"pixels of the image.{EXPORT_AGAIN}"
            )
        if sum(counts) != pixels:
            raise DataError(
                f"{where}: RLE counts add up to {sum(counts)}, but the image has {size[0]} rows of {size[1]} "
                f"pixels: {pixels}.{EXPORT_AGAIN}"
            )
        return cls(tuple(counts))


def _decompress(text: str, where: str) -> Sequence[int]:
    """Decode COCO's compressed counts.

    Like LEB128 with 5 bits to a character, each written as the character of code 48 + value: bit 5 means
    that the number goes on, and bit 4 of its last character is its sign. From the fourth on, a number is
    the difference to the count two places earlier.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise DataError(f"{where}: the RLE string is corrupt at {character!r}.{EXPORT_AGAIN}")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise DataError(f"{where}: the RLE string ends in the middle of a number.{EXPORT_AGAIN}")
    return counts
