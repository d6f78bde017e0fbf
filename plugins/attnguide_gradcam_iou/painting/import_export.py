"""Import and export of masks: LabelMe, a file for each image, and COCO, one for many images."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from attnguide.data.files import read_json
from attnguide.errors import DataError
from attnguide_gradcam_iou.painting.sheets import Sheets
from attnguide_gradcam_iou.painting.store import Bits, MaskStore

if TYPE_CHECKING:
    from attnguide.masks import LabeledMasks

__all__ = ["Imported", "as_coco", "as_labelme", "outlines", "read_into"]

#: Greatest number of pixels of an image in a file; images of the page are smaller.
_LARGEST = 100_000_000
#: Name of the masks if there are no classes.
WHOLE = "region"


class Imported(NamedTuple):
    """Result of an import: the number of masks, and a reason for each entry that was skipped."""

    masks: int
    skipped: list[str]


def as_labelme(sheets: Sheets, store: MaskStore, number: int) -> dict[str, Any]:
    """Export one sheet's masks to LabelMe: polygons that hold exactly the pixels of the masks."""
    width, height = sheets.picture(number).size
    common: dict[str, Any] = {"group_id": None, "description": "", "shape_type": "polygon", "flags": {}}
    shapes: list[dict[str, Any]] = [
        {"label": name, "points": points, **common}
        for name, mask in _masks(sheets, store, number)
        for points in outlines(mask)
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": sheets.name(number),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def as_coco(sheets: Sheets, store: MaskStore) -> dict[str, Any]:
    """Export all masks to COCO, as run lengths."""
    names = store.classes or (WHOLE,)
    document: dict[str, Any] = {
        "info": {"description": "masks painted with attnguide annotate"},
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
    }
    for number in range(len(sheets)):
        if not store.painted(sheets.stem(number)):
            continue
        masks = [
            (names[cls], mask)
            for cls in store.painted(sheets.stem(number))
            # In its own size: the image may be gone.
            if (mask := store.read(sheets.stem(number), cls)) is not None and mask.any()
        ]
        if not masks:
            continue
        height, width = masks[0][1].shape
        document["images"].append(
            {"id": number + 1, "file_name": sheets.name(number), "width": width, "height": height}
        )
        for name, mask in masks:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": names.index(name) + 1,
                    "segmentation": {"size": [height, width], "counts": _run_lengths(mask)},
                    "area": int(mask.sum()),
                    "bbox": [int(value) for value in box],
                    "iscrowd": 0,
                }
            )
    return document


def read_into(sheets: Sheets, store: MaskStore, content: bytes, number: int) -> Imported:
    """Import the masks of a LabelMe or COCO file; they replace existing ones.

    Args:
        sheets: Sheets that are painted on.
        store: Folder of the masks.
        content: Content of the file.
        number: The sheet that a LabelMe file belongs to, if no sheet has the name in the file.

    Raises:
        DataError: If the file is neither.
    """
    from attnguide.masks import read_coco, read_labelme

    with tempfile.TemporaryDirectory() as folder, _named(path := Path(folder) / "imported.json"):
        path.write_bytes(content)
        document = read_json(path)
        stems = {sheets.stem(n): n for n in range(len(sheets))}
        imported: list[tuple[int, LabeledMasks]] = []
        skipped = []
        if isinstance(document, dict) and "annotations" in document:
            found = read_coco(path)
            names = Counter(Path(name).stem for name, masks in found.items() if masks.shapes)
            for name, masks in found.items():
                place = 0 if sheets.template is not None else stems.get(Path(name).stem)
                several = sheets.template is None and names[Path(name).stem] > 1
                if place is not None and several and not _ends_with(sheets.paths[place], name):
                    skipped.append(f"{name}: {names[Path(name).stem]} images in the file have this name")
                elif place is not None:
                    imported.append((place, masks))
                elif masks.shapes:
                    skipped.append(f"{name}: there is no such image")
        elif isinstance(document, dict) and "shapes" in document:
            image = str(document.get("imagePath", "")).replace("\\", "/")
            imported.append((stems.get(Path(image).stem, number), read_labelme(path)))
        else:
            raise DataError("this is neither a LabelMe nor a COCO file. Export it again.")
    # All is drawn before anything is written, so that an error changes nothing.
    drawn: dict[tuple[int, int], Bits] = {}
    for place, masks in imported:
        skipped += [f"{count} of kind {kind}" for kind, count in masks.skipped.items()]
        skipped += _draw(drawn, place, masks, sheets.picture(place).size[::-1], store.classes)
    for (place, cls), bits in drawn.items():
        store.write(sheets.stem(place), cls, bits)
    return Imported(len(drawn), list(dict.fromkeys(skipped)))


def _draw(
    drawn: dict[tuple[int, int], Bits],
    place: int,
    masks: LabeledMasks,
    size: tuple[int, int],
    classes: Sequence[str],
) -> list[str]:
    """Add an image's masks to those of the same sheet and class; return reasons for what was skipped."""
    from attnguide.masks import ClassNames, fits

    names = ClassNames(classes or (WHOLE,))
    height, width = masks.size
    # A file may claim any size, and is drawn in it.
    if not fits(masks.size, size) or height * width > _LARGEST:
        return [f"{width}×{height} pixels do not fit an image of {size[1]}×{size[0]}"]
    skipped = []
    for label in masks.labels:
        name = names.find(label) if classes else WHOLE
        if name is None:
            skipped.append(f"{label}: there is no such class")
            continue
        bits = _resized(masks.tensor([label], strict=False)[0].numpy() > 0.5, size)
        if not bits.any():
            skipped.append(f"{label}: no pixel of the image lies in it")
            continue
        key = place, names.names.index(name)
        drawn[key] = drawn[key] | bits if key in drawn else bits
    return skipped


def _ends_with(path: Path, name: str) -> bool:
    """Whether a file's path ends with a name that may hold folders, whatever the suffix of both."""
    parts = Path(name).with_suffix("").parts
    return path.absolute().with_suffix("").parts[-len(parts) :] == parts


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors as its owner knows it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(path), "the file")) from error


def outlines(mask: Bits) -> list[list[list[float]]]:
    """Draw polygons, `[x, y]` in pixels, around the connected parts of a mask.

    Drawn by the even–odd rule at the centres of pixels they give the mask again. A hole is joined to the
    outline by a cut, which runs there and back and encloses nothing.
    """
    from skimage.measure import find_contours, label

    parts, count = label(mask, connectivity=1, return_num=True)  # type: ignore[no-untyped-call]
    polygons = []
    for part in range(1, count + 1):
        # Contours run between the centres of pixels inside and outside.
        loops = find_contours(np.pad(parts == part, 1).astype(float), 0.5)  # type: ignore[no-untyped-call]
        points: list[list[float]] = []
        for loop in loops:
            corners = [[float(x) - 0.5, float(y) - 0.5] for y, x in _without_straight(loop)]
            points += [*corners, corners[0]] if len(loops) > 1 else corners
        if len(loops) > 1:  # back along the cuts
            points += [[float(x) - 0.5, float(y) - 0.5] for y, x in (loop[0] for loop in loops[-2::-1])]
        polygons.append(points)
    return polygons


def _without_straight(loop: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Remove the last point of a closed contour, which is its first, and points on straight lines."""
    points = loop[:-1]
    into, out = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = (into != out).any(axis=1)
    turns[0] = True
    kept: npt.NDArray[np.float64] = points[turns]
    return kept


def _masks(sheets: Sheets, store: MaskStore, number: int) -> Iterator[tuple[str, Bits]]:
    size = sheets.picture(number).size[::-1]
    names: Sequence[str] = store.classes or (WHOLE,)
    for cls in store.painted(sheets.stem(number)):
        mask = store.read(sheets.stem(number), cls, size)
        if mask is not None and mask.any():
            yield names[cls], mask


def _run_lengths(mask: Bits) -> list[int]:
    """Return COCO's counts: lengths of outside and inside in turn, column by column."""
    flat = np.concatenate([[False], mask.T.ravel()])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(n) for n in np.diff([0, *ends, mask.size])]


def _resized(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> Bits:
    if mask.shape == size:
        return mask
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(int)
    resized: Bits = mask[rows[:, None], columns]
    return resized
