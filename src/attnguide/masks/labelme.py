"""Reads annotation files of LabelMe."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from attnguide.data.files import read_json
from attnguide.errors import DataError, nearest
from attnguide.masks._entries import EXPORT_AGAIN, as_point, get_size, get_value, shortened
from attnguide.masks._shapes import Circle, Polygon, Shape
from attnguide.masks.annotations import LabeledMasks

__all__ = ["read_labelme"]

_WITHOUT_AREA = frozenset({"line", "linestrip", "mask", "point", "points"})


def read_labelme(path: str | Path) -> LabeledMasks:
    """Read a LabelMe annotation file, which is about one image.

    Polygons, rectangles and circles become regions. Points and lines enclose nothing, and masks of LabelMe's
    assistant are not read; `skipped` counts them by shape type.

    Args:
        path: The `.json` file that LabelMe wrote.

    Returns:
        The regions.

    Raises:
        DataError: The file cannot be read, or is not what LabelMe writes.
    """
    document = read_json(path)
    size = get_size(document, "imageHeight", "imageWidth", str(path))
    shapes: list[tuple[str, Shape]] = []
    skipped: Counter[str] = Counter()
    for number, entry in enumerate(get_value(document, "shapes", list, str(path))):
        where = f"{path}: shapes[{number}]"
        label = get_value(entry, "label", str, where)
        # Files older than the other shapes do not name the type.
        kind = get_value(entry, "shape_type", str, where) if "shape_type" in entry else "polygon"
        if kind in _WITHOUT_AREA:
            skipped[kind] += 1
            continue
        points = [as_point(point, where) for point in get_value(entry, "points", list, where)]
        shapes.append((label, _labelme_shape(kind, points, where)))
    return LabeledMasks(size, tuple(shapes), skipped, str(path))


def _labelme_shape(kind: str, points: list[tuple[float, float]], where: str) -> Shape:
    match kind, points:
        case "polygon", [_, _, _, *_]:
            return Polygon(tuple(points))
        case "rectangle", [(x0, y0), (x1, y1)]:
            return Polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)))
        case "circle", [centre, rim]:
            return Circle(centre, math.dist(centre, rim))
        case "polygon" | "rectangle" | "circle", _:
            needed = "at least 3" if kind == "polygon" else "2"
            raise DataError(f"{where}: a {kind} has {needed} points, got {len(points)}.{EXPORT_AGAIN}")
    known = ("polygon", "rectangle", "circle", *_WITHOUT_AREA)
    raise DataError(f"{where}: unknown shape_type {shortened(kind)}.{nearest(kind, sorted(known))}")
