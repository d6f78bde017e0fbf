"""Landmarks of real faces: read, and maps drawn from them where the faces are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.real_data import RealData

from attnguide.data.images import read_image
from attnguide_action_units.landmarks import MIRROR
from attnguide_action_units.prior import ActionUnitPrior
from attnguide_action_units.tables import LandmarkTable, read_landmarks


@pytest.fixture(scope="module")
def table(real_data: RealData) -> LandmarkTable:
    return read_landmarks(real_data.path("fer_faces/fer_faces.npz"))


def test_every_face_of_the_table_has_its_landmarks(real_data: RealData, table: LandmarkTable) -> None:
    paths = sorted(real_data.path("fer_faces/images").iterdir())
    assert len(table) == len(paths) == 1022
    with np.load(real_data.path("fer_faces/fer_faces.npz"), allow_pickle=False) as arrays:
        expected = dict(zip(map(str, arrays["files"]), arrays["landmarks68"], strict=True))
    for path in paths[::100]:
        assert read_image(path).size == (112, 112)
        points = table.of(path)
        assert points is not None
        (whole,) = (value for name, value in expected.items() if name.endswith(path.name))
        np.testing.assert_allclose(points.numpy(), whole, rtol=1e-6)


def test_maps_lie_in_the_face_and_in_its_mirror_image(table: LandmarkTable) -> None:
    prior = ActionUnitPrior(classes=["surprise", "happiness", "sadness"])
    points = table.points[::40]
    labels = torch.arange(len(points)) % 3
    maps, weights = prior.draw(points, labels, (56, 56), (112, 112))
    assert maps.shape == (len(points), 56, 56)
    assert bool(((maps >= 0) & (maps <= 1)).all())
    shown = maps[weights > 0]
    assert len(shown) > 0.9 * len(maps)
    rows, columns = torch.meshgrid(torch.arange(56) * 2 + 1.0, torch.arange(56) * 2 + 1.0, indexing="ij")
    low, high = points.amin(dim=1), points.amax(dim=1)
    span = (high - low)[:, None, None]
    for axis, places in enumerate((columns, rows)):
        centre = (maps * places).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp_min(1e-9)
        near = (centre > low[:, axis]) & (centre < high[:, axis] + 0.1 * span[:, 0, 0, axis])
        assert bool(near[weights > 0].all())
    mirrored = points[:, list(MIRROR)].clone()
    mirrored[..., 0] = 111 - mirrored[..., 0]
    turned, _ = prior.draw(mirrored, labels, (56, 56), (112, 112))
    torch.testing.assert_close(turned.flip(-1)[weights > 0], shown, rtol=1e-3, atol=1e-4)


def test_landmarks_of_photographs_with_many_faces(real_data: RealData) -> None:
    document = json.loads(real_data.path("dlib_faces/dlib_faces.json").read_text(encoding="utf-8"))
    prior = ActionUnitPrior(generic=True)
    drawn = 0
    for entry in document["images"]:
        with Image.open(real_data.path(f"dlib_faces/{entry['file']}")) as image:
            assert image.size == (entry["width"], entry["height"])
        for face in entry["faces"]:
            points = torch.tensor(face["points"], dtype=torch.float32)[None]
            size = (entry["height"], entry["width"])
            maps, weights = prior.draw(points, None, (size[0] // 4, size[1] // 4), size)
            assert bool(maps.isfinite().all())
            if not bool(weights):
                continue
            drawn += 1
            box = face["box"]
            rows = torch.arange(maps.shape[1])[:, None] * 4 + 2
            columns = torch.arange(maps.shape[2]) * 4 + 2
            margin = 0.6 * box["width"]
            near = (rows >= box["top"] - margin) & (rows <= box["top"] + box["height"] + margin)
            near = near & (columns >= box["left"] - margin) & (columns <= box["left"] + box["width"] + margin)
            assert float((maps[0] * near).sum() / maps[0].sum()) > 0.95, (entry["file"], box)
    assert drawn > 35
