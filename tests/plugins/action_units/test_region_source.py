"""Parts of a face that are drawn around landmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import ConvexHull
from skimage.morphology import isotropic_dilation

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import DataError
from attnguide.interfaces import RegionSource
from attnguide.masks import Polygon
from attnguide.parts.registry import registry
from attnguide_action_units.region_source import LandmarkRegions
from attnguide_action_units.tables import LandmarkTable


def blank(path: Path, size: tuple[int, int]) -> Path:
    Image.new("RGB", size[::-1]).save(path)
    return path


def test_parts_are_hulls_of_their_landmarks_with_a_margin(tmp_path: Path) -> None:
    faces = ProceduralFaces(3, 96, seed=1).stack()
    points = faces.landmarks.as_subclass(torch.Tensor)
    paths = [blank(tmp_path / f"{n}.png", (96, 96)) for n in range(3)]
    source = LandmarkRegions(LandmarkTable(tuple(path.name for path in paths), points))
    masks = source(faces.image, [[path] for path in paths])
    assert masks.shape == (3, 5, 96, 96)
    for face, regions in zip(points.double().numpy(), masks, strict=True):
        hull = face[48:60][ConvexHull(face[48:60]).vertices]
        mouth = Polygon(tuple((float(x), float(y)) for x, y in hull)).draw((96, 96))
        eyes = face[36:42].mean(axis=0) - face[42:48].mean(axis=0)
        grown = isotropic_dilation(mouth, 0.06 * np.hypot(*eyes))
        np.testing.assert_array_equal(regions[source.names.index("mouth")].numpy() > 0, grown)
        inside = regions[source.names.index("face")] > 0
        for name in ("eyes", "nose", "mouth"):
            part = regions[source.names.index(name)] > 0
            assert (part & inside).sum() > 0.9 * part.sum() > 0


def test_landmarks_are_resized_with_their_image_and_averaged(tmp_path: Path) -> None:
    square = torch.tensor([[10.0, 10], [30, 10], [30, 30], [10, 30]]).repeat(17, 1)
    small, large = blank(tmp_path / "small.png", (50, 50)), blank(tmp_path / "large.png", (100, 100))
    source = LandmarkRegions(LandmarkTable(("small.png", "large.png"), torch.stack([square, 2 * square + 8])))
    masks = source(torch.zeros(3, 3, 50, 50), [[small], [large], [small, large]])
    face = masks[:, source.names.index("face")]
    for mask, shift in zip(face, (0, 4, 2), strict=True):
        rows, columns = (np.flatnonzero(mask.amax(dim=axis).numpy()) for axis in (1, 0))
        assert (rows[0], rows[-1], columns[0], columns[-1]) == tuple(shift + n for n in (10, 29, 10, 29))


def test_landmarks_on_a_line_enclose_nothing(tmp_path: Path) -> None:
    path = blank(tmp_path / "a.png", (50, 50))
    points = torch.rand(1, 68, 2, generator=torch.Generator().manual_seed(0)) * 40
    points[:, 36:48] = torch.tensor([10.0, 20.0])
    masks = LandmarkRegions(LandmarkTable(("a.png",), points))(torch.zeros(1, 3, 50, 50), [[path]])
    painted = dict(zip(LandmarkRegions.names, masks[0].flatten(1).any(dim=1).tolist(), strict=True))
    assert painted == {"face": True, "eyebrows": True, "eyes": False, "nose": True, "mouth": True}


def test_an_image_that_is_not_in_the_table(tmp_path: Path) -> None:
    LandmarkTable(("a.png",), torch.rand(1, 68, 2)).save(tmp_path / "table.npz")
    path, images = blank(tmp_path / "b.png", (50, 50)), torch.zeros(1, 3, 50, 50)
    source = registry().create("regions", "landmarks", RegionSource, landmarks=tmp_path / "table.npz")
    with pytest.raises(DataError, match=r"no landmarks of b\.png, or not all 68"):
        source(images, [[path]])
    with pytest.raises(DataError, match="no landmarks of any of 2 images"):
        source(images, [[path, path]])
    with pytest.raises(DataError, match="does not exist"):
        registry().create("regions", "landmarks", RegionSource, landmarks=tmp_path / "none.npz")
