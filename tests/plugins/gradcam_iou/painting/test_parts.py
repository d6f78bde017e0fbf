"""Parts of faces that the painting page offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.plugins.gradcam_iou.helpers import SIZE, picture
from torch import Tensor

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import DataError
from attnguide.interfaces import RegionSource
from attnguide.parts.registry import registry
from attnguide.visual import to_pil
from attnguide_action_units.tables import LandmarkTable
from attnguide_gradcam_iou.painting.parts import SheetRegions
from attnguide_gradcam_iou.painting.sheets import find_sheets
from attnguide_segmentation.regions import merged


def regions(name: str, **options: Path) -> RegionSource:
    source: RegionSource = registry().create("regions", name, RegionSource, **options)
    return source


def test_parts_that_a_parser_finds(tmp_path: Path) -> None:
    face = ProceduralFaces(1, seed=3)[0]
    to_pil(face.image).save(tmp_path / "face.png")
    sheets = find_sheets([str(tmp_path / "face.png")], None, tmp_path / "masks-of-it")
    parts = SheetRegions(sheets, regions("face_parser"))
    mouth = parts.mask(0, parts.names.index("mouth"))
    truth = merged(face.segmentation.as_subclass(torch.Tensor)).numpy() == parts.names.index("mouth")
    assert (mouth & truth).sum() / (mouth | truth).sum() > 0.5


def test_parts_between_landmarks(tmp_path: Path) -> None:
    points = torch.rand(2, 68, 2, generator=torch.Generator().manual_seed(1)) * 4 + 30
    square = torch.tensor([[10.0, 40], [30, 40], [30, 48], [10, 48]])
    points[:, 48:60] = square.repeat(3, 1)
    points[1] += 2
    points[:, 36:42] = torch.tensor([10.0, 20.0])
    points[:, 42:48] = torch.tensor([30.0, 20.0])
    paths = [picture(tmp_path / f"{name}.png", (60, 50)) for name in ("a", "b")]
    picture(tmp_path / "c.png", (60, 50))
    LandmarkTable(("a.png", "b.png"), points).save(tmp_path / "table.npz")
    source = regions("landmarks", landmarks=tmp_path / "table.npz")
    lost = SheetRegions(find_sheets([str(tmp_path / "c.png")], None, tmp_path / "masks-of-it"), source)
    mouth = lost.names.index("mouth")
    y, x = np.mgrid[:60, :50] + 0.5
    for kind, offset in ((None, 0), ("average", 1)):
        sheets = find_sheets(list(map(str, paths)), kind, tmp_path / "masks-of-it")
        found = SheetRegions(sheets, source).mask(0, mouth)
        inside = (x > 10 + offset) & (x < 30 + offset) & (y > 40 + offset) & (y < 48 + offset)
        assert found[inside].all()
        assert inside.sum() < found.sum() < inside.sum() + 90  # by the margin of 1.2 pixels
    with pytest.raises(DataError, match=r"no landmarks of c\.png"):
        lost.mask(0, mouth)


def test_a_sheet_is_looked_at_once_as_long_as_it_is_shown(tmp_path: Path) -> None:
    class Halves(RegionSource):
        """The left and the right half, coarser than the image."""

        names = ("left", "right")

        def __init__(self) -> None:
            self.files: list[list[str]] = []

        def __call__(self, images: Tensor, files: Sequence[Sequence[Path]]) -> Tensor:
            assert images.shape == (1, 3, *SIZE)
            assert 0 <= images.min() < images.max() <= 1
            self.files += [[path.name for path in several] for several in files]
            left = torch.tensor([1.0, 0]).expand(1, 1, 2, 2)
            return torch.cat([left, 1 - left], dim=1)

    paths = [str(picture(tmp_path / f"{name}.png")) for name in ("a", "b")]
    parts = SheetRegions(find_sheets(paths, None, tmp_path / "masks"), source := Halves())
    left, right = parts.mask(1, 0), parts.mask(1, 1)
    assert left.shape == SIZE
    assert left[:, :20].all()
    assert not left[:, 20:].any()
    assert (left != right).all()
    parts.mask(0, 0)
    assert source.files == [["b.png"], ["a.png"]]
    SheetRegions(find_sheets(paths, "average", tmp_path / "masks"), source).mask(0, 0)
    SheetRegions(find_sheets([], paths[1], tmp_path / "masks"), source).mask(0, 0)
    assert source.files[2:] == [["a.png", "b.png"], ["b.png"]]
