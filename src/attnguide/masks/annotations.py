"""Masks out of annotation files: LabelMe and COCO."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from attnguide.data.files import read_json
from attnguide.data.images import MAX_PIXELS
from attnguide.errors import DataError, nearest
from attnguide.masks._shapes import EXPORT_AGAIN, Circle, Polygon, RunLengths, Shape
from attnguide.masks.class_names import ClassNames, Size

__all__ = ["LabelledMasks", "read_coco", "read_labelme"]

T = TypeVar("T")

# Coordinates may lie outside the image, but not so far that they must be garbage.
_EXTENT = 1e6
_WITHOUT_AREA = frozenset({"line", "linestrip", "mask", "point", "points"})


@dataclass(frozen=True)
class LabelledMasks:
    """What an annotation file says about one image. Masks are drawn when they are asked for.

    Attributes:
        size: Height and width of the image in pixels.
        shapes: Label and shape of every region, in the order of the file.
        skipped: Number of entries of each kind that were left out because they describe no region.
        source: The file, and the image in it, for errors.
    """

    size: tuple[int, int]
    shapes: tuple[tuple[str, Shape], ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occur, in the order of the file."""
        return tuple(dict.fromkeys(label for label, _ in self.shapes))

    @property
    def masks(self) -> dict[str, Tensor]:
        """The union of the regions of each label: float tensors `(H, W)` of 0 and 1."""
        return {label: self._draw([label]) for label in self.labels}

    def tensor(self, classes: Sequence[str], size: Size | None = None, *, strict: bool = True) -> Tensor:
        """Draw the regions of a model's classes.

        Args:
            classes: The model's classes; a label matches whatever its case, and `_` counts as a space.
            size: Size of the masks; that of the image if None.
            strict: Whether a label that is none of the classes is an error; if not, it is left out.

        Returns:
            Float tensor `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region, or
            whose regions hold no pixel, being outside the image or too small.

        Raises:
            InputError: There are no classes, or the size is not positive.
            UnknownNameError: A label is none of the classes, and `strict` is true.
        """
        names = ClassNames(classes)
        spellings: dict[str, list[str]] = {}
        for label in self.labels:
            name = names.get(label, self.source) if strict else names.find(label)
            if name is not None:
                spellings.setdefault(name, []).append(label)
        regions = {name: self._draw(labels) for name, labels in spellings.items()}
        regions = {name: region for name, region in regions.items() if region.any()}
        return names.stack(regions, self.size if size is None else size)

    def _draw(self, labels: Sequence[str]) -> Tensor:
        drawn = (shape.draw(self.size) for label, shape in self.shapes if label in labels)
        return torch.from_numpy(reduce(np.logical_or, drawn)).float()


def read_labelme(path: str | Path) -> LabelledMasks:
    """Read a LabelMe annotation file, which is about one image.

    Polygons, rectangles and circles become regions. Points and lines enclose nothing and masks out of
    LabelMe's assistant are not read; all of them are counted in `skipped` by shape type.

    Args:
        path: The `.json` file that LabelMe wrote.

    Returns:
        The regions.

    Raises:
        DataError: The file cannot be read, or is not what LabelMe writes.
    """
    document = read_json(path)
    size = _size(document, "imageHeight", "imageWidth", str(path))
    shapes: list[tuple[str, Shape]] = []
    skipped: Counter[str] = Counter()
    for number, entry in enumerate(_get(document, "shapes", list, str(path))):
        where = f"{path}: shapes[{number}]"
        label = _get(entry, "label", str, where)
        # Files older than the other shapes do not name the type.
        kind = _get(entry, "shape_type", str, where) if "shape_type" in entry else "polygon"
        if kind in _WITHOUT_AREA:
            skipped[kind] += 1
            continue
        points = [_point(point, where) for point in _get(entry, "points", list, where)]
        shapes.append((label, _labelme_shape(kind, points, where)))
    return LabelledMasks(size, tuple(shapes), skipped, str(path))


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
    raise DataError(f"{where}: unknown shape_type {_short(kind)}.{nearest(kind, sorted(known))}")


def read_coco(path: str | Path, *, crowd: bool = True) -> dict[str, LabelledMasks]:
    """Read a COCO annotation file, which is about many images.

    Segmentations may be polygons, run lengths, or compressed run lengths. An annotation without one, as in
    files of boxes only, is counted in `skipped` as `"no segmentation"`.

    Args:
        path: The `.json` file, for example `instances_val2017.json`.
        crowd: Whether regions of a crowd (`iscrowd` 1) count; if not, `skipped` counts them as `"crowd"`.

    Returns:
        The regions of every image by its `file_name`; an image without annotations has none.

    Raises:
        DataError: The file cannot be read, is not in COCO's format, or contradicts itself.
    """
    document = read_json(path)
    labels = {
        key: _get(entry, "name", str, where) for key, entry, where in _by_id(document, "categories", path)
    }
    sizes: dict[object, tuple[int, int]] = {}
    names: dict[object, str] = {}
    seen: set[str] = set()
    for key, entry, where in _by_id(document, "images", path):
        name = _get(entry, "file_name", str, where)
        if name in seen:
            raise DataError(f"{where}: another image has the file_name {_short(name)} too.{EXPORT_AGAIN}")
        seen.add(name)
        names[key], sizes[key] = name, _size(entry, "height", "width", where)

    shapes: dict[object, list[tuple[str, Shape]]] = {key: [] for key in names}
    skipped: dict[object, Counter[str]] = {key: Counter() for key in names}
    for number, entry in enumerate(_get(document, "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        image = _reference(entry, "image_id", names, where)
        category = _reference(entry, "category_id", labels, where)
        if entry.get("iscrowd", 0) not in (0, 1):
            raise DataError(f"{where}: iscrowd must be 0 or 1, got {_short(entry['iscrowd'])}.{EXPORT_AGAIN}")
        if not entry.get("segmentation"):
            skipped[image]["no segmentation"] += 1
        elif entry.get("iscrowd") and not crowd:
            skipped[image]["crowd"] += 1
        else:
            regions = _coco_shapes(entry["segmentation"], sizes[image], where)
            shapes[image] += [(labels[category], region) for region in regions]
    return {
        name: LabelledMasks(sizes[key], tuple(shapes[key]), skipped[key], f"{path}: {name}")
        for key, name in names.items()
    }


def _coco_shapes(segmentation: object, size: tuple[int, int], where: str) -> list[Shape]:
    if isinstance(segmentation, dict):
        declared = _get(segmentation, "size", list, where)
        if declared != list(size):
            raise DataError(
                f"{where}: the RLE is of size {_short(declared)}, but its image of {list(size)}."
                f"{EXPORT_AGAIN}"
            )
        return [RunLengths.parse(_get(segmentation, "counts", (str, list), where), size, where)]
    if not isinstance(segmentation, list):
        raise DataError(
            f"{where}: segmentation must be polygons or RLE, got {_short(segmentation)}.{EXPORT_AGAIN}"
        )
    shapes: list[Shape] = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(
                f"{where}: a polygon must be a list [x, y, x, y, …] of at least 3 points, "
                f"got {_short(polygon)}.{EXPORT_AGAIN}"
            )
        pairs = zip(polygon[::2], polygon[1::2], strict=True)
        shapes.append(Polygon(tuple(_point(list(pair), where) for pair in pairs)))
    return shapes


def _by_id(document: object, name: str, path: str | Path) -> Iterator[tuple[object, object, str]]:
    """Yield id, entry and whereabouts of each entry of one of COCO's lists."""
    seen: set[object] = set()
    for number, entry in enumerate(_get(document, name, list, str(path))):
        where = f"{path}: {name}[{number}]"
        key = _get(entry, "id", (int, str), where)
        if key in seen:
            raise DataError(f"{where}: another entry has the id {_short(key)} too.{EXPORT_AGAIN}")
        seen.add(key)
        yield key, entry, where


def _reference(entry: object, name: str, known: Mapping[object, object], where: str) -> object:
    key = _get(entry, name, (int, str), where)
    if key not in known:
        raise DataError(f"{where}: {name} {_short(key)} is the id of no entry.{EXPORT_AGAIN}")
    return key


def _get(entry: object, name: str, kind: type[T] | tuple[type[T], ...], where: str) -> T:
    """Return a value out of a JSON object, if it is there and of the right kind."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be a JSON object, got {_short(entry)}.{EXPORT_AGAIN}")
    if name not in entry:
        raise DataError(f"{where} has no {name!r}.{EXPORT_AGAIN}")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {name!r} must be of type {kinds}, got {_short(value)}.{EXPORT_AGAIN}")
    return value


def _size(entry: object, height: str, width: str, where: str) -> tuple[int, int]:
    size = _get(entry, height, int, where), _get(entry, width, int, where)
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: {height} and {width} are {_short(size[0])} and {_short(size[1])}; they must be "
            f"positive, with at most {MAX_PIXELS} pixels in all.{EXPORT_AGAIN}"
        )
    return size


def _point(point: object, where: str) -> tuple[float, float]:
    if (
        not isinstance(point, list)
        or len(point) != 2
        or not all(type(x) in (int, float) and abs(x) <= _EXTENT for x in point)  # NaN fails as well
    ):
        raise DataError(
            f"{where}: a point must be two numbers from {-_EXTENT:g} to {_EXTENT:g}, "
            f"got {_short(point)}.{EXPORT_AGAIN}"
        )
    return float(point[0]), float(point[1])


def _short(value: object) -> str:
    """Show a value of a file whose size nobody vouches for."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
