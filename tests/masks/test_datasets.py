"""Any data set with masks from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers import masks as drawn
from tests.helpers.celeba import make_celeba
from tests.helpers.pictures import picture
from torch.utils.data import StackDataset, Subset
from torchvision.transforms import v2

from attnguide.data.celeba import CelebA
from attnguide.errors import DataError, InputError
from attnguide.masks import WithMasks

TO_TENSOR = v2.Compose([v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
CORNER = drawn.region(32, 32, slice(0, 16), slice(0, 16))


def test_masks_of_single_celeba_images(tmp_path: Path) -> None:
    make_celeba(tmp_path, 6, size=(60, 70))
    data = CelebA(tmp_path, "all", attributes=["Smiling", "Bald"], transform=TO_TENSOR)
    drawn.paint(tmp_path / "masks" / "000002.png", CORNER)
    whole = WithMasks(data, tmp_path / "masks", 16)
    assert len(whole) == 6
    assert whole[1][2].shape == (16, 16)
    assert whole[1][2].sum() == 64
    assert bool(whole[0][2].isnan().all())
    drawn.paint(tmp_path / "parts" / "bald" / "000003.png", CORNER)
    parts = WithMasks(data, tmp_path / "parts", 16, data.classes)
    assert parts[2][2].shape == (2, 16, 16)
    assert parts[0][2].shape == (2, 16, 16)
    with pytest.raises(InputError, match=r"0 names for 3 samples.*names="):
        WithMasks(Subset(data, [0, 1, 2]), tmp_path / "masks", 16)
    with pytest.raises(DataError, match=r"none of the images, such as a\.jpg"):
        WithMasks(StackDataset(torch.zeros(1)), tmp_path / "masks", 16, names=["a.jpg"])


def test_masks_that_are_not_the_images(tmp_path):
    images = StackDataset(torch.zeros(2, 3, 16, 16), torch.zeros(2, 2))
    drawn.paint(tmp_path / "masks" / "1.png", drawn.region(32, 32))
    with pytest.raises(DataError, match=r"1\.png is the mask of cat/1\.jpg, .* dog/1\.jpg too"):
        WithMasks(images, tmp_path / "masks", 16, names=["cat/1.jpg", "dog/1.jpg"])
    with pytest.raises(DataError, match=r"2 samples are called 1\.jpg, and would share"):
        WithMasks(images, tmp_path / "masks", 16, names=["1.jpg", "1.jpg"])
    assert (
        len(WithMasks(images, tmp_path / "masks", 16, names=["cat/1.jpg", "cat/1.jpg"])) == 2
    )  # drawn twice
    data = WithMasks(images, tmp_path / "masks", (16, 12), names=["1.jpg", "2.jpg"])
    with pytest.raises(InputError, match=r"size \(16, 12\) of the masks has 16 rows and 12 columns"):
        data[0]
    photo = picture(tmp_path / "photos" / "1.jpg", 0, (40, 60))
    data = WithMasks(images, tmp_path / "masks", 16, names=[photo, "2.jpg"])
    with pytest.raises(DataError, match=r"1\.png has 32×32 pixels, but .*photos/1\.jpg has 60×40"):
        data[0]
    assert data[1][2].isnan().all()


def test_values_inside(tmp_path):
    images = StackDataset(torch.zeros(1, 3, 16, 16), torch.zeros(1, 2))
    drawn.paint(
        tmp_path / "1.png",
        drawn.region(16, 16, value=7) + drawn.region(16, 16, slice(8, 12), slice(8, 12), 9),
    )
    with pytest.raises(DataError, match=r"3 values"):
        WithMasks(images, tmp_path, 16, names=["1.jpg"])[0]
    mask = WithMasks(images, tmp_path, 16, names=["1.jpg"], inside=9)[0][2]
    assert mask.sum() == 16
    assert mask[8:12, 8:12].all()
