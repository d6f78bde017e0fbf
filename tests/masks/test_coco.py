"""Annotation files of COCO."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from tests.helpers.masks import CLASSES, without, write

from attnguide.errors import DataError
from attnguide.masks import (
    read_coco,
)

TRIANGLE = [1.0, 1.0, 9.0, 1.0, 1.0, 9.0]


def annotation(**fields):
    return {"id": 1, "image_id": 7, "category_id": 3, "iscrowd": 0, "segmentation": [TRIANGLE], **fields}


def coco_file(*annotations, **fields):
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 10, "width": 12}],
        "categories": [{"id": 3, "name": "bald"}, {"id": 5, "name": "smiling"}],
        "annotations": list(annotations),
        **fields,
    }


def test_coco(tmp_path):
    rng = np.random.default_rng(0)
    blobs = rng.random((2, 10, 12)) < 0.1
    compressed = coco.encode(np.asfortranarray(blobs[0], dtype=np.uint8))
    columns = np.concatenate(
        [[0], np.abs(np.diff(blobs[1].T.ravel().astype(int), prepend=0)).nonzero()[0], [120]]
    )
    document = coco_file(
        annotation(),
        annotation(segmentation=[[0, 9, 3, 9, 3, 10, 0, 10], [9, 9, 12, 9, 12, 10, 9, 10]]),
        annotation(category_id=5, segmentation={"size": [10, 12], "counts": compressed["counts"].decode()}),
        annotation(
            category_id=5, iscrowd=1, segmentation={"size": [10, 12], "counts": np.diff(columns).tolist()}
        ),
        annotation(segmentation=[]),
        without(annotation(), "segmentation"),
        images=[
            {"id": 7, "file_name": "a.jpg", "height": 10, "width": 12},
            {"id": "x", "file_name": "sub/b.jpg", "height": 5, "width": 5},
        ],
    )
    path = write(tmp_path / "coco.json", document)
    read = read_coco(path)
    assert list(read) == ["a.jpg", "sub/b.jpg"]
    assert read["sub/b.jpg"].labels == ()
    assert read["a.jpg"].skipped == {"no segmentation": 2}
    masks = read["a.jpg"].tensor(CLASSES)
    assert masks.shape == (3, 10, 12)
    assert np.array_equal(masks[0], blobs.any(axis=0))
    assert masks[2, 9].tolist() == [1, 1, 1, *[0] * 6, 1, 1, 1]
    assert masks[2, :9].sum() == pytest.approx(32, abs=4)

    alone = read_coco(path, crowd=False)["a.jpg"]
    assert np.array_equal(alone.masks["smiling"], blobs[0])
    assert alone.skipped == {"crowd": 1, "no segmentation": 2}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([TRIANGLE[:4]], "polygon of fewer than 3 points"),
        ([[]], "polygon of fewer than 3 points"),
        ([TRIANGLE[:5]], "polygon with half a point"),
        ([[*TRIANGLE, 1]], "polygon with half a point"),
        ([[1, 1, 2, 2, 3, 3]], "polygon without area"),
        ([[4, 4] * 3], "polygon without area"),
        ({"size": [10, 12], "counts": []}, "empty run lengths"),
        ({"size": [10, 12], "counts": ""}, "empty run lengths"),
        ([], "no segmentation"),
        (None, "no segmentation"),
    ],
)
def test_a_speck_does_not_spoil_the_file(tmp_path, segmentation, reason):
    document = coco_file(annotation(), annotation(segmentation=segmentation))
    read = read_coco(write(tmp_path / "coco.json", document))["a.jpg"]
    assert read.skipped == {reason: 1}
    alone = read_coco(write(tmp_path / "alone.json", coco_file(annotation())))["a.jpg"]
    assert torch.equal(read.masks["bald"], alone.masks["bald"])


def test_a_speck_beside_a_polygon(tmp_path):
    document = coco_file(annotation(segmentation=[TRIANGLE, TRIANGLE[:4]]))
    read = read_coco(write(tmp_path / "coco.json", document))["a.jpg"]
    assert len(read.shapes) == 1
    assert sum(read.skipped.values()) == 1


def rle(counts, size=(10, 12)):
    return coco_file(annotation(segmentation={"size": size, "counts": counts}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("hello", "not valid JSON"),
        (without(coco_file(), "images"), "no 'images'"),
        (without(coco_file(), "categories"), "no 'categories'"),
        (without(coco_file(), "annotations"), "no 'annotations'"),
        (coco_file(images={}), "'images' must be of type list"),
        (
            coco_file(images=[{"id": 7, "file_name": "a", "height": -1, "width": 5}]),
            r"images\[0\]: .* positive",
        ),
        (
            coco_file(images=[{"id": 7, "file_name": "a", "height": 10**9, "width": 5}]),
            r"images\[0\]: .* at most",
        ),
        (
            coco_file(images=[{"id": [], "file_name": "a", "height": 1, "width": 5}]),
            "must be of type int or str",
        ),
        (coco_file(images=coco_file()["images"] * 2), r"images\[1\]: another entry has the id 7"),
        (
            coco_file(images=[*coco_file()["images"], {**coco_file()["images"][0], "id": 8}]),
            "the file_name 'a.jpg'",
        ),
        (coco_file(categories=[{"id": 3}]), r"categories\[0\] has no 'name'"),
        (coco_file(5), r"annotations\[0\] must be a JSON object"),
        (coco_file(annotation(), without(annotation(), "image_id")), r"annotations\[1\] has no 'image_id'"),
        (coco_file(annotation(image_id=8)), "image_id 8 is the id of no entry"),
        (coco_file(annotation(category_id=8)), "category_id 8 is the id of no entry"),
        (coco_file(annotation(iscrowd=2)), "iscrowd must be 0 or 1"),
        (coco_file(annotation(segmentation="polygon")), "must be polygons or RLE"),
        (coco_file(annotation(segmentation=TRIANGLE)), "at least 3 points, got 1.0"),
        (coco_file(annotation(segmentation=[[*TRIANGLE, 1, math.inf]])), "a point must be two numbers"),
        (coco_file(annotation(segmentation={"counts": [120]})), "has no 'size'"),
        (coco_file(annotation(segmentation={"size": [10, 12]})), "has no 'counts'"),
        (rle([120], (12, 10)), "is of size"),
        (rle([119]), r"add up to 119, but the image has 10 rows of 12 pixels: 120"),
        (rle([100, 40, -20]), "integers from 0 to 120"),
        (rle([60.0, 60.0]), "integers from 0 to 120"),
        (rle([9 * 10**4299] * 2), "integers from 0 to 120"),
        (coco_file(annotation(image_id=9 * 10**4200)), "is the id of no entry"),
        (rle(120), "'counts' must be of type str or list"),
        (rle("0" * 5), "add up to"),
        (rle("~~"), "corrupt at '~'"),
        (rle("é"), "corrupt at 'é'"),
        (rle("o" * 5), "ends in the middle"),
        (rle("o" * 50), "corrupt at 'o'"),
    ],
)
def test_malformed_coco(tmp_path, document, message):
    path = write(tmp_path / "coco.json", document)
    with pytest.raises(DataError, match=message) as error:
        read_coco(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_duplicate_category_names_are_one_class(tmp_path):
    categories = [{"id": 3, "name": "bald"}, {"id": 4, "name": "Bald"}]
    document = coco_file(
        annotation(),
        annotation(category_id=4, segmentation=[[0, 9, 12, 9, 12, 10, 0, 10]]),
        categories=categories,
    )
    read = read_coco(write(tmp_path / "coco.json", document))["a.jpg"]
    assert read.labels == ("bald", "Bald")
    assert torch.equal(read.tensor(CLASSES)[2], read.masks["bald"] + read.masks["Bald"])
