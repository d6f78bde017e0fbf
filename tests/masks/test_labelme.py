"""Annotation files of LabelMe."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.masks import CLASSES, without, write
from tests.helpers.pictures import picture

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
    ("points", "area"),
    [
        ([[10, 5], [20, 5], [20, 15], [10, 15]], 100),
        ([[20, 15], [10, 5], [10, 15], [20, 5]], 100),  # corners in any order
        ([[15, 2], [23, 10], [15, 18], [7, 10]], 128),  # on its corner
    ],
)
@pytest.mark.parametrize("kind", ["rectangle", "oriented_rectangle", "oriented rectangle", "rotation"])
def test_rectangles_of_four_corners(tmp_path, kind, points, area):
    read = read_labelme(write(tmp_path / "a.json", labelme(shape("Bald", kind, points))))
    assert read.masks["Bald"].sum() == pytest.approx(area, abs=16)
    assert read.masks["Bald"][10, 15] == 1
    assert read.skipped == {}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_masks_of_the_assistant(tmp_path):
    """LabelMe keeps the pixels of a box, of which both corners are part, as 0 and 1."""
    pixels = np.random.default_rng(0).random((4, 3)) > 0.5
    inside = {**shape("Bald", "mask", [[5, 2], [7, 5]]), "mask": png(pixels)}
    beyond = {**shape("Smiling", "mask", [[28, 2], [30, 5]]), "mask": png(pixels)}
    read = read_labelme(write(tmp_path / "a.json", labelme(inside, beyond)))
    expected = np.zeros((20, 30))
    expected[2:6, 5:8] = pixels
    assert np.array_equal(read.masks["Bald"], expected)
    expected[:] = 0
    expected[2:6, 28:] = pixels[:, :2]
    assert np.array_equal(read.masks["Smiling"], expected)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (shape("Bald", "polygn", [[0, 0], [4, 0], [4, 4]]), "polygn"),
        (without(shape("Bald", "cuboid3d", []), "points"), "cuboid3d"),
        (shape("Bald", "line", "nothing"), "line"),
        ({**shape("Bald", "mask", [[5, 2], [7, 5]]), "mask": "é"}, "mask that cannot be read"),
        (shape("Bald", "x" * 100, []), "x" * 60 + "…"),
        (shape("Bald", "points", [[0, 0], [4, 0], [4, 4]]), "points"),
        (shape("Bald", "polygon", []), "polygon of 0 points"),
        (shape("Bald", "polygon", [[1, 2], [3, 4]]), "polygon of 2 points"),
        (shape("Bald", None, [[1, 2], [3, 4]]), "polygon of 2 points"),
        (shape("Bald", "polygon", [[1, 2], [3, 4], [5, 6]]), "polygon without area"),
        (shape("Bald", "polygon", [[1, 2]] * 3), "polygon without area"),
        (shape("Bald", "rectangle", [[1, 2]]), "rectangle of 1 point"),
        (shape("Bald", "rectangle", [[1, 2], [1, 8]]), "rectangle without area"),
        (shape("Bald", "circle", [[1, 2], [1, 2]]), "circle without area"),
        (shape("Bald", "circle", [[1, 2]]), "circle of 1 point"),
        (shape("Bald", "mask", [[5, 2], [7, 5]]), "mask that cannot be read"),
        ({**shape("Bald", "mask", [[5, 2], [7, 5]]), "mask": "no base64!"}, "mask that cannot be read"),
        ({**shape("Bald", "mask", [[5, 2], [7, 5]]), "mask": "aGVsbG8="}, "mask that cannot be read"),
        ({**shape("Bald", "mask", [[5, 2]]), "mask": png([[1]])}, "mask of 1 point"),
        (
            {**shape("Bald", "mask", [[5, 2], [7, 5]]), "mask": png([[1]])},
            "mask of another size than its corners",
        ),
        ({**shape("Bald", "mask", [[5, 2], [5, 2]]), "mask": png([[0]])}, "mask without area"),
    ],
)  # fmt: skip
def test_one_shape_without_area_does_not_spoil_the_file(tmp_path, entry, reason):
    read = read_labelme(write(tmp_path / "a.json", labelme(BOX, entry, entry)))
    assert read.skipped == {reason: 2}
    assert list(read.masks) == ["bald"]
    assert read.masks["bald"].sum() == 32


def test_the_size_is_that_of_the_image(tmp_path):
    read = read_labelme(write(tmp_path / "a.json", labelme(BOX)))
    read.check_fit(picture(tmp_path / "a.png", 0, (40, 60)))
    with pytest.raises(DataError, match=r"a\.json has 30×20 pixels, but .*b\.png has 20×30.*EXIF"):
        read.check_fit(picture(tmp_path / "b.png", 0, (30, 20)))
    with pytest.raises(DataError, match="the mask of 'Bald' has 30×20 pixels, but the size"):
        read.tensor(CLASSES, (30, 20))


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
