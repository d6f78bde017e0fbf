"""Masks go into the files of other tools and come back unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.plugins.gradcam_iou.helpers import SIZE, picture, some_mask

from attnguide.errors import DataError
from attnguide.masks import Polygon, read_coco, read_labelme
from attnguide_gradcam_iou.painting import import_export
from attnguide_gradcam_iou.painting.sheets import find_sheets
from attnguide_gradcam_iou.painting.store import MaskStore


def test_outlines_hold_exactly_the_pixels() -> None:
    for seed in range(40):
        generator = np.random.default_rng(seed)
        mask = generator.random(generator.integers(1, 30, 2)) < generator.random()
        drawn = np.zeros_like(mask)
        for points in import_export.outlines(mask):
            drawn ^= Polygon(tuple((x, y) for x, y in points)).draw(mask.shape)
        np.testing.assert_array_equal(drawn, mask)
    ring = np.pad(np.pad(np.zeros((3, 3), bool), 2, constant_values=True), 1)
    (only,) = import_export.outlines(ring)
    np.testing.assert_array_equal(Polygon(tuple((x, y) for x, y in only)).draw(ring.shape), ring)


def test_there_and_back(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / "images" / f"{name}.png")
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks-of-it")
    store = MaskStore(tmp_path / "masks", ["cat", "dog"], template=False)
    store.write("one", 0, some_mask(1))
    store.write("one", 1, some_mask(2))
    store.write("two", 1, some_mask(3))
    labelme, coco = import_export.as_labelme(sheets, store, 0), import_export.as_coco(sheets, store)
    (tmp_path / "labelme.json").write_text(json.dumps(labelme))
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    read = read_labelme(tmp_path / "labelme.json").tensor(["cat", "dog"])
    np.testing.assert_array_equal(read.numpy() > 0, [some_mask(1), some_mask(2)])
    two = read_coco(tmp_path / "coco.json")["two.png"].tensor(["cat", "dog"])
    np.testing.assert_array_equal(two[1].numpy() > 0, some_mask(3))

    other = MaskStore(tmp_path / "other", ["cat", "dog"], template=False)
    found = import_export.read_into(sheets, other, json.dumps(coco).encode(), 0)
    assert found == (3, [])
    np.testing.assert_array_equal(other.read("one", 1, SIZE), some_mask(2))
    labelme["imagePath"] = "elsewhere/unknown.png"
    labelme["shapes"].append({**labelme["shapes"][0], "label": "fish"})
    labelme["shapes"].append({"label": "cat", "shape_type": "point", "points": [[1, 1]]})
    found = import_export.read_into(sheets, other, json.dumps(labelme).encode(), 1)
    assert found == (2, ["1 of kind point", "fish: there is no such class"])
    np.testing.assert_array_equal(other.read("two", 0, SIZE), some_mask(1))
    with pytest.raises(DataError, match="neither a LabelMe nor a COCO"):
        import_export.read_into(sheets, other, b"{}", 0)


def test_an_import_is_all_or_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / "images" / f"{name}.png")
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks")
    store = MaskStore(tmp_path / "masks", ["cat"], template=False)
    store.write("one", 0, some_mask(1))
    store.write("two", 0, some_mask(2))
    coco = import_export.as_coco(sheets, store)
    (tmp_path / "images" / "two.png").write_bytes(b"gone")
    assert import_export.as_coco(sheets, store) == coco  # masks are told even where the image is gone
    store.write("one", 0, some_mask(3))
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks")
    with pytest.raises(DataError, match=r"two\.png"):
        import_export.read_into(sheets, store, json.dumps(coco).encode(), 0)
    np.testing.assert_array_equal(store.read("one", 0, SIZE), some_mask(3))

    picture(tmp_path / "template.png")
    once = find_sheets([], str(tmp_path / "template.png"), tmp_path / "once")
    united = MaskStore(tmp_path / "once", ["cat"], template=True)
    outside = {**coco["annotations"][0], "id": 9, "segmentation": [[500, 500, 600, 500, 600, 600]]}
    coco["categories"].append({"id": 2, "name": "dog"})
    coco["annotations"] += [outside, {**outside, "id": 10, "category_id": 2}]
    large = {**coco["images"][0], "id": 7, "file_name": "large.png", "width": 400_000, "height": 400}
    coco["images"].append(large)
    coco["annotations"].append({**outside, "id": 11, "image_id": 7})
    found = import_export.read_into(once, united, json.dumps(coco).encode(), 0)
    assert found.masks == 1
    assert found.skipped == ["dog: there is no such class", "400000×400 pixels do not fit an image of 40×30"]
    np.testing.assert_array_equal(united.read("", 0, SIZE), some_mask(1) | some_mask(2))


def test_images_of_one_name_in_a_file(tmp_path: Path) -> None:
    """Only the one whose folder is that of the sheet is meant; the other is left out with the reason."""
    picture(tmp_path / "images" / "dog" / "one.png")
    sheets = find_sheets([str(tmp_path / "images")], None, tmp_path / "masks")
    store = MaskStore(tmp_path / "masks", ["cat"], template=False)
    store.write("one", 0, some_mask(1))
    coco = import_export.as_coco(sheets, store)
    (entry,), (annotation,) = coco["images"], coco["annotations"]
    coco["images"] = [{**entry, "file_name": "dog/one.jpg"}, {**entry, "id": 9, "file_name": "cat/one.jpg"}]
    whole = {"size": [entry["height"], entry["width"]], "counts": [0, entry["height"] * entry["width"]]}
    coco["annotations"].append({**annotation, "id": 9, "image_id": 9, "segmentation": whole})
    other = MaskStore(tmp_path / "other", ["cat"], template=False)
    found = import_export.read_into(sheets, other, json.dumps(coco).encode(), 0)
    assert found == (1, ["cat/one.jpg: 2 images in the file have this name"])
    np.testing.assert_array_equal(other.read("one", 0, SIZE), some_mask(1))
