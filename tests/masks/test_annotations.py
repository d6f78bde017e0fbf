"""LabelMe and COCO describe the same regions, and give the same masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnguide.errors import UnknownNameError
from attnguide.masks import read_coco, read_labelme

SQUARE = [[2, 1], [6, 1], [6, 5], [2, 5]]


@pytest.fixture
def labelme(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    shapes = [
        {"label": "Red_Fox", "shape_type": "polygon", "points": SQUARE},
        {"label": "red fox", "shape_type": "rectangle", "points": [[0, 0], [1, 1]]},
        {"label": "dog", "shape_type": "point", "points": [[3, 3]]},
    ]
    path.write_text(json.dumps({"version": "5", "shapes": shapes, "imageHeight": 8, "imageWidth": 10}))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    path = tmp_path / "coco.json"
    common = {"image_id": 4, "category_id": 2, "iscrowd": 0}
    square = [value for point in SQUARE for value in point]
    document = {
        "images": [{"id": 4, "file_name": "a.jpg", "height": 8, "width": 10}],
        "categories": [{"id": 2, "name": "red fox"}],
        "annotations": [
            {"id": 1, **common, "segmentation": [square]},
            {"id": 2, **common, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
        ],
    }
    path.write_text(json.dumps(document))
    return path


def test_both_give_the_same_masks(labelme: Path, coco: Path) -> None:
    one, other = read_labelme(labelme), read_coco(coco)["a.jpg"]
    expected = torch.zeros(8, 10)
    expected[1:5, 2:6] = 1
    expected[0, 0] = 1
    for read in (one, other):
        assert read.size == (8, 10)
        masks = read.tensor(["dog", "red_fox"])
        assert bool(masks[0].isnan().all())  # a point is not a region
        assert torch.equal(masks[1], expected)
    assert one.labels == ("Red_Fox", "red fox")
    assert one.skipped == {"point": 1}


def test_labels_that_are_not_classes(labelme: Path) -> None:
    read = read_labelme(labelme)
    with pytest.raises(UnknownNameError, match="Red_Fox"):
        read.tensor(["cat"])
    assert bool(read.tensor(["cat"], strict=False).isnan().all())
    assert set(read.masks) == {"Red_Fox", "red fox"}
