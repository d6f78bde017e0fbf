"""Data sets of faces with label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.helpers.helen import make_helen
from torchvision.transforms import v2

from attnguide.errors import AttnGuideError
from attnguide_segmentation.datasets import LabelMaps, celebamask, helen, lapa, read_labels
from attnguide_segmentation.regions import REGIONS, SCHEMES


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)


def grey(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_lapa(tmp_path: Path) -> None:
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 11
    picture(tmp_path / "train/images/7.png")
    grey(tmp_path / "train/labels/7.png", labels)
    sample = lapa(tmp_path, transform=v2.RandomHorizontalFlip(p=1))[0]
    assert sample.image.shape == (3, 8, 8)
    expected = [[SCHEMES["helen"][label] for label in row[::-1]] for row in labels.tolist()]
    assert [[REGIONS[region] for region in row] for row in sample.regions.tolist()] == expected
    with pytest.raises(AttnGuideError, match="split of LaPa 'dev'"):
        lapa(tmp_path, "dev")
    with pytest.raises(AttnGuideError, match="is not a folder"):
        lapa(tmp_path, "val")


def test_helen(tmp_path: Path) -> None:
    make_helen(tmp_path)
    data = helen(tmp_path)
    assert len(data) == 1
    assert [REGIONS[row[0]] for row in data[0].regions.tolist()] == list(SCHEMES["helen"][:8])
    # Where two labels claim a pixel as much, the first stands.
    twice = np.full((8, 8), 200, dtype=np.uint8)
    grey(tmp_path / "labels/a_1/a_1_lbl10.png", twice)
    assert [REGIONS[row[0]] for row in data[0].regions.tolist()] == list(SCHEMES["helen"][:8])


def test_celebamask(tmp_path: Path) -> None:
    picture(tmp_path / "CelebA-HQ-img/2001.jpg", 16)
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, :4] = 255
    folder = tmp_path / "CelebAMask-HQ-mask-anno/1"
    grey(folder / "02001_skin.png", np.full((8, 8), 255, dtype=np.uint8))
    grey(folder / "02001_hair.png", half)
    regions = celebamask(tmp_path)[0].regions
    assert regions.shape == (16, 16)
    assert regions[:, :8].eq(REGIONS.index("hair")).all()
    assert regions[:, 8:].eq(REGIONS.index("face_skin")).all()
    (folder / "02001_skin.png").unlink()
    with pytest.raises(AttnGuideError, match=r"has no mask 02001_skin\.png"):
        celebamask(tmp_path)


def test_bad_label_maps(tmp_path: Path) -> None:
    picture(tmp_path / "images/1.png")
    grey(tmp_path / "labels/1.png", np.full((8, 8), 44, dtype=np.uint8))
    data = LabelMaps.in_folders(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(AttnGuideError, match=r"1\.png: the label map holds \[44\]"):
        data[0]
    grey(tmp_path / "labels/1.png", np.zeros((4, 8), dtype=np.uint8))
    with pytest.raises(AttnGuideError, match="is 4×8 pixels, the image 8×8"):
        data[0]
    picture(tmp_path / "labels/1.png")
    with pytest.raises(AttnGuideError, match="of mode RGB; a label map is grey"):
        read_labels(tmp_path / "labels/1.png")
    (tmp_path / "labels/1.png").unlink()
    with pytest.raises(AttnGuideError, match="1 files are missing"):
        LabelMaps.in_folders(tmp_path / "images", tmp_path / "labels")
