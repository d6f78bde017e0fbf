"""Reads annotation files of COCO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from attnguide.data.files import read_json
from attnguide.errors import DataError
from attnguide.masks._entries import EXPORT_AGAIN, as_point, get_size, get_value, shortened
from attnguide.masks._shapes import Polygon, RunLengths, Shape
from attnguide.masks.annotations import LabeledMasks

__all__ = ["read_coco"]


def read_coco(path: str | Path, *, crowd: bool = True) -> dict[str, LabeledMasks]:
    """Read a COCO annotation file, which is about many images.

    Segmentations may be polygons, run lengths, or compressed run lengths. What has no area is left out and
    counted in `skipped`: an annotation without a segmentation, as in files of boxes only, as `"no
    segmentation"`, and polygons and run lengths that exporters write for specks as `"polygon of fewer than 3
    points"`, `"polygon with half a point"`, `"polygon without area"` and `"empty run lengths"`.

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
        key: get_value(entry, "name", str, where)
        for key, entry, where in _by_id(document, "categories", path)
    }
    sizes: dict[object, tuple[int, int]] = {}
    names: dict[object, str] = {}
    seen: set[str] = set()
    for key, entry, where in _by_id(document, "images", path):
        name = get_value(entry, "file_name", str, where)
        if name in seen:
            raise DataError(f"{where}: another image has the file_name {shortened(name)} too.{EXPORT_AGAIN}")
        seen.add(name)
        names[key], sizes[key] = name, get_size(entry, "height", "width", where)

    shapes: dict[object, list[tuple[str, Shape]]] = {key: [] for key in names}
    skipped: dict[object, Counter[str]] = {key: Counter() for key in names}
    for number, entry in enumerate(get_value(document, "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        image = _reference(entry, "image_id", names, where)
        category = _reference(entry, "category_id", labels, where)
        is_crowd = entry.get("iscrowd", 0)
        if is_crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd must be 0 or 1, got {shortened(is_crowd)}.{EXPORT_AGAIN}")
        if not entry.get("segmentation"):
            skipped[image]["no segmentation"] += 1
        elif is_crowd and not crowd:
            skipped[image]["crowd"] += 1
        else:
            regions = _coco_shapes(entry["segmentation"], sizes[image], where, skipped[image])
            shapes[image] += [(labels[category], region) for region in regions]
    return {
        name: LabeledMasks(sizes[key], tuple(shapes[key]), skipped[key], f"{path}: {name}")
        for key, name in names.items()
    }


def _coco_shapes(
    segmentation: object, size: tuple[int, int], where: str, skipped: Counter[str]
) -> list[Shape]:
    if isinstance(segmentation, dict):
        declared = get_value(segmentation, "size", list, where)
        if declared != list(size):
            raise DataError(
                f"{where}: the RLE is of size {shortened(declared)}, but its image of {list(size)}."
                f"{EXPORT_AGAIN}"
            )
        counts = get_value(segmentation, "counts", (str, list), where)
        if not counts:
            skipped["empty run lengths"] += 1
            return []
        return [RunLengths.parse(counts, size, where)]
    if not isinstance(segmentation, list):
        raise DataError(
            f"{where}: segmentation must be polygons or RLE, got {shortened(segmentation)}.{EXPORT_AGAIN}"
        )
    shapes: list[Shape] = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            raise DataError(
                f"{where}: a polygon must be a list [x, y, x, y, …] of at least 3 points, "
                f"got {shortened(polygon)}.{EXPORT_AGAIN}"
            )
        # What there is must be numbers, even if it is too little.
        points = [as_point(polygon[n : n + 2], where) for n in range(0, len(polygon) - 1, 2)]
        if len(polygon) % 2:
            skipped["polygon with half a point"] += 1
        elif len(points) < 3:
            skipped["polygon of fewer than 3 points"] += 1
        elif (shape := Polygon(tuple(points))).is_flat:
            skipped["polygon without area"] += 1
        else:
            shapes.append(shape)
    return shapes


def _by_id(document: object, name: str, path: str | Path) -> Iterator[tuple[object, object, str]]:
    """Yield the id, the entry and its place in the file, for each entry of one of COCO's lists."""
    seen: set[object] = set()
    for number, entry in enumerate(get_value(document, name, list, str(path))):
        where = f"{path}: {name}[{number}]"
        key = get_value(entry, "id", (int, str), where)
        if key in seen:
            raise DataError(f"{where}: another entry has the id {shortened(key)} too.{EXPORT_AGAIN}")
        seen.add(key)
        yield key, entry, where


def _reference(entry: object, name: str, known: Mapping[object, object], where: str) -> object:
    key = get_value(entry, name, (int, str), where)
    if key not in known:
        raise DataError(f"{where}: {name} {shortened(key)} is the id of no entry.{EXPORT_AGAIN}")
    return key
