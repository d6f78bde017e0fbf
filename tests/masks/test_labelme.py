"""Annotation files of LabelMe."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers.masks import CLASSES, without, write

from attnguide.errors import DataError, UnknownNameError
from attnguide.masks import (
    Circle,
    read_labelme,
)


def labelme(*shapes, height=20, width=30):
    return {"version": "5.4.1", "shapes": list(shapes), "imageHeight": height, "imageWidth": width}


def shape(label, kind, points):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}}


BOX = shape("bald", "rectangle", [[10, 5], [2, 1]])


def test_labelme(tmp_path):
    document = labelme(
        BOX,
        shape("Smiling", "polygon", [[20, 10], [30, 10], [30, 20], [20, 20]]),
        shape("Smiling", "circle", [[5, 15], [5, 18]]),
        shape("Smiling", "point", [[1, 1]]),
        shape("Bald", "linestrip", [[1, 1], [2, 2]]),
        shape("Bald", "linestrip", [[1, 1], [2, 2], [3, 3]]),
    )
    read = read_labelme(write(tmp_path / "a.json", document))
    assert read.size == (20, 30)
    assert read.labels == ("bald", "Smiling")
    assert read.skipped == {"point": 1, "linestrip": 2}
    bald, smiling = torch.zeros(20, 30), torch.zeros(20, 30)
    bald[1:5, 2:10] = 1
    assert torch.equal(read.masks["bald"], bald)
    smiling[10:, 20:] = 1
    smiling += torch.from_numpy(Circle((5, 15), 3).draw((20, 30)))
    masks = read.tensor(CLASSES)
    assert masks.dtype == torch.float32
    assert torch.equal(masks[0], smiling)
    assert masks[1].isnan().all()
    assert torch.equal(masks[2], bald)
    assert read.tensor(CLASSES, size=10).shape == (3, 10, 10)


def test_labelme_of_old_has_no_types(tmp_path):
    old = shape("Bald", None, [[0, 0], [4, 0], [4, 4], [0, 4]])
    del old["shape_type"]
    assert read_labelme(write(tmp_path / "a.json", labelme(old))).masks["Bald"].sum() == 16


def test_labels_beyond_the_classes(tmp_path):
    read = read_labelme(write(tmp_path / "a.json", labelme(BOX, {**BOX, "label": "Smilling"})))
    with pytest.raises(UnknownNameError, match=r"a\.json.*'Smilling'. Did you mean 'Smiling'"):
        read.tensor(CLASSES)
    assert read.tensor(CLASSES, strict=False)[0].isnan().all()


def test_regions_without_a_pixel_are_no_annotation(tmp_path):
    outside = {**BOX, "points": [[100, 100], [200, 200]]}
    assert read_labelme(write(tmp_path / "a.json", labelme(outside))).tensor(CLASSES).isnan().all()


def test_no_shapes(tmp_path):
    read = read_labelme(write(tmp_path / "a.json", labelme()))
    assert read.masks == {}
    assert read.tensor(CLASSES).shape == (3, 20, 30)
    assert read.tensor(CLASSES).isnan().all()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not valid JSON"),
        ([], "must be a JSON object"),
        (without(labelme(), "shapes"), "no 'shapes'"),
        (without(labelme(), "imageHeight"), "no 'imageHeight'"),
        (labelme(height=None), "'imageHeight' must be of type int, got None"),
        (labelme(height=-3), "must be positive"),
        (labelme(height=10**6, width=10**6), "at most"),
        (labelme(height=10**400), "at most"),
        (labelme(height=True), "must be of type int"),
        (labelme(BOX, "shape"), r"shapes\[1\] must be a JSON object"),
        (labelme(without(BOX, "label")), r"shapes\[0\] has no 'label'"),
        (labelme(without(BOX, "points")), r"shapes\[0\] has no 'points'"),
        (labelme({**BOX, "shape_type": "polygn"}), r"shapes\[0\]: unknown shape_type 'polygn'. Did you mean"),
        (labelme({**BOX, "shape_type": "polygon"}), "a polygon has at least 3 points, got 2"),
        (labelme({**BOX, "points": [[1, 2]]}), "a rectangle has 2 points, got 1"),
        (labelme({**BOX, "points": [[1, 2], [3]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, "4"]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, math.nan]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, 1e300]]}), "a point must be two numbers"),
        (labelme({**BOX, "points": [[1, 2], [3, 10**400]]}), "a point must be two numbers"),
    ],
)
def test_malformed_labelme(tmp_path, document, message):
    path = write(tmp_path / "a.json", document)
    with pytest.raises(DataError, match=message) as error:
        read_labelme(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600
