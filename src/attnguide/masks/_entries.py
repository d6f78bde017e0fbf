"""Gets checked values from the entries of annotation files."""

from __future__ import annotations

import reprlib
from typing import TypeVar

from attnguide.data.images import MAX_PIXELS
from attnguide.errors import DataError

__all__ = ["EXPORT_AGAIN", "as_point", "get_size", "get_value", "shortened"]

T = TypeVar("T")

#: The remedy that ends every error about an entry.
EXPORT_AGAIN = " Correct the entry, or export the file again."
# Coordinates may lie outside the image, but not so far that they must be garbage.
_EXTENT = 1e6


def get_value(entry: object, name: str, kind: type[T] | tuple[type[T], ...], where: str) -> T:
    """Return a value of a JSON object; an error if it is missing or of another type."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be a JSON object, got {shortened(entry)}.{EXPORT_AGAIN}")
    if name not in entry:
        raise DataError(f"{where} has no {name!r}.{EXPORT_AGAIN}")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {name!r} must be of type {kinds}, got {shortened(value)}.{EXPORT_AGAIN}")
    return value


def get_size(entry: object, height: str, width: str, where: str) -> tuple[int, int]:
    """Return the height and width that an entry gives."""
    size = get_value(entry, height, int, where), get_value(entry, width, int, where)
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: {height} and {width} are {shortened(size[0])} and {shortened(size[1])}; they must be "
            f"positive, with at most {MAX_PIXELS} pixels in all.{EXPORT_AGAIN}"
        )
    return size


def as_point(point: object, where: str) -> tuple[float, float]:
    """Return a point `[x, y]` of a file as numbers."""
    if (
        not isinstance(point, list)
        or len(point) != 2
        or not all(type(x) in (int, float) and abs(x) <= _EXTENT for x in point)  # NaN fails as well
    ):
        raise DataError(
            f"{where}: a point must be two numbers from {-_EXTENT:g} to {_EXTENT:g}, "
            f"got {shortened(point)}.{EXPORT_AGAIN}"
        )
    return float(point[0]), float(point[1])


def shortened(value: object) -> str:
    """Show a value of any size in at most 61 characters."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
