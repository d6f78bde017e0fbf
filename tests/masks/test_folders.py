"""Templates, and folders with masks for each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.masks import CLASSES, paint, region

from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.masks import (
    MaskFolder,
    load_template,
)

# Templates ----------------------------------------------------------------------------------------------


def test_folder_template(tmp_path):
    paint(tmp_path / "wearing lipstick.png", region(rows=slice(2, 4)))
    paint(tmp_path / "SMILING.PNG", region())
    (tmp_path / "notes.txt").write_text("painted by hand")
    paint(tmp_path / "._Bald.png", region())
    masks, painted = load_template(tmp_path, CLASSES)
    assert painted == ("Smiling", "Wearing_Lipstick")
    assert np.array_equal(masks[0], region() / 255)
    assert np.array_equal(masks[1], region(rows=slice(2, 4)) / 255)
    assert masks[2].isnan().all()
    assert masks.shape == (3, 4, 6)


def test_folder_of_several_sizes(tmp_path):
    paint(tmp_path / "Bald.png", region())
    paint(tmp_path / "Smiling.png", region(8, 12, slice(0, 4), slice(0, 6)))
    masks, _ = load_template(tmp_path, CLASSES)
    assert torch.equal(masks[0], masks[2])
    assert load_template(tmp_path, CLASSES, 2).masks.shape == (3, 2, 2)
    assert load_template(tmp_path, CLASSES, (5, 9)).masks.shape == (3, 5, 9)


def test_folder_names_an_unknown_class(tmp_path):
    paint(tmp_path / "Smilling.png", region())
    with pytest.raises(UnknownNameError, match=r"Smilling\.png.*Did you mean 'Smiling'"):
        load_template(tmp_path, CLASSES)


def test_folder_without_a_template(tmp_path):
    with pytest.raises(DataError, match="holds no image"):
        load_template(tmp_path, CLASSES)
    paint(tmp_path / "Bald.png", region())
    paint(tmp_path / "bald.png", region())
    with pytest.raises(DataError, match="both for 'Bald'"):
        load_template(tmp_path, CLASSES)
    with pytest.raises(InputError, match="Leave it out"):
        load_template(tmp_path, CLASSES, legend=tmp_path / "legend.json")
    with pytest.raises(DataError, match="does not exist"):
        load_template(tmp_path / "nothing", CLASSES)


def test_empty_region_in_a_folder(tmp_path):
    paint(tmp_path / "Bald.png", region(value=0))
    with pytest.raises(DataError, match=r"Bald\.png: the region of 'Bald' is empty"):
        load_template(tmp_path, CLASSES)


# Masks for each image -----------------------------------------------------------------------------------


def test_one_mask_for_each_image(tmp_path):
    paint(tmp_path / "cat.1.png", region())
    masks = MaskFolder(tmp_path)
    assert len(masks) == 1
    assert "photos/cat.1.jpg" in masks
    assert np.array_equal(masks.get("photos/cat.1.jpg"), region() / 255)
    assert masks.get("cat.jpg") is None
    assert MaskFolder(tmp_path, size=2).get("cat.1.jpg").shape == (2, 2)
    assert torch.equal(MaskFolder(tmp_path, CLASSES).get("cat.1.jpg"), masks.get("cat.1.jpg").repeat(3, 1, 1))


@pytest.mark.parametrize("layout", ["{name}/{stem}.png", "{stem}/{name}.png"])
def test_masks_for_classes(tmp_path, layout):
    paint(tmp_path / layout.format(name="smiling", stem="7"), region())
    paint(tmp_path / layout.format(name="Bald", stem="7"), region(8, 12, slice(0, 4), slice(0, 6)))
    paint(tmp_path / layout.format(name="Bald", stem="8"), region())
    masks = MaskFolder(tmp_path, CLASSES, size=(4, 6))
    assert len(masks) == 2
    assert "7.jpg" in masks
    expected = torch.from_numpy(region() / 255).float()
    seven = masks.get("7.jpg")
    assert torch.equal(seven[0], expected)
    assert seven[1].isnan().all()
    assert torch.equal(seven[2], expected)
    assert masks.get("8.jpg")[0].isnan().all()
    assert masks.get("9.jpg") is None


def test_mask_folders_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        MaskFolder(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no mask"):
        MaskFolder(tmp_path)
    paint(tmp_path / "Smilling" / "7.png", region())
    with pytest.raises(UnknownNameError, match=r"Smilling/7\.png"):
        MaskFolder(tmp_path, CLASSES)
    with pytest.raises(InputError, match="Pass classes"):
        MaskFolder(tmp_path)
    (tmp_path / "Smilling").rename(tmp_path / "Smiling")
    paint(tmp_path / "7.png", region())
    with pytest.raises(DataError, match=r"Keep one kind"):
        MaskFolder(tmp_path, CLASSES)
    paint(tmp_path / "7.bmp", region())
    with pytest.raises(DataError, match=r"7\.png and .*7\.bmp are both for '7'|7\.bmp.*7\.png"):
        MaskFolder(tmp_path, CLASSES)
