"""Reads annotation files of LabelMe."""

from __future__ import annotations

import base64
import math
from collections import Counter
from pathlib import Path

import numpy as np

from attnguide.data.files import read_json
from attnguide.data.images import decode_image
from attnguide.masks._entries import as_point, get_size, get_value
from attnguide.masks._shapes import Bitmap, Circle, Polygon, Shape
from attnguide.masks.annotations import LabeledMasks

__all__ = ["read_labelme"]

#: Names under which LabelMe and tools that write its format keep four corners in any direction.
_TURNED = frozenset({"oriented_rectangle", "rotated_rectangle", "rotation"})
#: Types of shapes that have an area. Points and lines enclose nothing.
_REGIONS = frozenset({"polygon", "rectangle", "circle", "mask"}) | _TURNED


def read_labelme(path: str | Path) -> LabeledMasks:
    """Read a LabelMe annotation file, which is about one image.

    Polygons, rectangles of two or four corners in any direction, circles, and masks of LabelMe's assistant
    become regions. `skipped` counts what does not: points, lines and unknown shapes by their type, and shapes
    without area as `"polygon without area"` and the like.

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
        named = entry.get("shape_type") is not None
        kind = get_value(entry, "shape_type", str, where) if named else "polygon"
        if kind.replace(" ", "_") not in _REGIONS:
            skipped[kind if len(kind) <= 60 else f"{kind[:60]}…"] += 1
            continue
        points = [as_point(point, where) for point in get_value(entry, "points", list, where)]
        shape = _bitmap(entry, points, where) if kind == "mask" else _outline(kind, points)
        if isinstance(shape, str):
            skipped[shape] += 1
        else:
            shapes.append((label, shape))
    return LabeledMasks(size, tuple(shapes), skipped, str(path))


def _outline(kind: str, points: list[tuple[float, float]]) -> Shape | str:
    """Return the region of a shape, or why there is none."""
    name = kind.replace(" ", "_")
    match name, points:
        case "polygon", [_, _, _, *_]:
            shape = Polygon(tuple(points))
        case "rectangle", [(x0, y0), (x1, y1)]:
            shape = Polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)))
        case _, [_, _, _, _] if name == "rectangle" or name in _TURNED:
            x, y = (sum(values) / 4 for values in zip(*points, strict=True))
            # Around the centre, whatever their order.
            shape = Polygon(tuple(sorted(points, key=lambda point: math.atan2(point[1] - y, point[0] - x))))
        case "circle", [centre, rim]:
            radius = math.dist(centre, rim)
            return Circle(centre, radius) if radius > 0 else "circle without area"
        case _:
            return f"{kind} of {_counted(len(points))}"
    return f"{kind} without area" if shape.is_flat else shape


def _counted(points: int) -> str:
    return f"{points} point" if points == 1 else f"{points} points"


def _bitmap(entry: object, points: list[tuple[float, float]], where: str) -> Shape | str:
    """Return the region of a mask: a PNG file in base64, between two corners that belong to it."""
    if len(points) != 2:
        return f"mask of {_counted(len(points))}"
    (left, top), (right, bottom) = ((int(x), int(y)) for x, y in points)
    try:
        content = base64.b64decode(get_value(entry, "mask", str, where), validate=True)
        pixels = np.asarray(decode_image(content, f"{where}: its mask")) > 0
    except ValueError:  # `DataError`, and what is not base64
        return "mask that cannot be read"
    if pixels.shape != (bottom - top + 1, right - left + 1):
        return "mask of another size than its corners"
    return Bitmap((left, top), pixels) if pixels.any() else "mask without area"
