"""Templates, and folders with masks for each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.masks import CLASSES, paint, region, write

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


def test_folder_of_several_proportions(tmp_path):
    paint(tmp_path / "Bald.png", region())
    paint(tmp_path / "Smiling.png", region(60, 60))
    for size in (None, 8):
        with pytest.raises(DataError, match="mask of 'Smiling' has 60×60 pixels, but that of 'Bald' has 6×4"):
            load_template(tmp_path, CLASSES, size)


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


def test_values_inside(tmp_path):
    paint(tmp_path / "7.png", region() + region(rows=slice(2, 4), value=1))
    with pytest.raises(DataError, match=r"7\.png has 3 values, .*inside="):
        MaskFolder(tmp_path).get("7.jpg")
    assert np.array_equal(MaskFolder(tmp_path, inside=255).get("7.jpg"), region() / 255)
    assert np.array_equal(MaskFolder(tmp_path, inside="1").get("7.jpg"), region(rows=slice(2, 4), value=1))
    paint(tmp_path / "classes" / "Bald.png", region() + region(rows=slice(2, 4), value=1))
    masks, _ = load_template(tmp_path / "classes", CLASSES, inside=1)
    assert np.array_equal(masks[2], region(rows=slice(2, 4), value=1))
    with pytest.raises(InputError, match="Give it a legend"):
        load_template(tmp_path / "7.png", CLASSES, inside=1)


def test_a_legend_for_many_masks(tmp_path):
    first, second = region(value=1), region(rows=slice(2, 4), value=2)
    paint(tmp_path / "7.png", first + second)
    paint(tmp_path / "8.png", second)
    write(tmp_path / "legend.json", {"1": "bald", "2": ["smiling", "Wearing Lipstick"]})
    masks = MaskFolder(tmp_path, CLASSES)
    seven, eight = masks.get("7.jpg"), masks.get("8.jpg")
    assert np.array_equal(seven, np.stack([second / 2, second / 2, first]))
    assert np.array_equal(eight[:2], np.stack([second / 2] * 2))
    assert eight[2].isnan().all()
    assert np.array_equal(masks.get_class("7.jpg", "Bald"), first)
    assert masks.get_class("8.jpg", "Bald") is None
    assert MaskFolder(tmp_path, CLASSES, size=2).get("8.jpg").shape == (3, 2, 2)
    with pytest.raises(InputError, match=r"legend\.json names classes. Pass classes"):
        MaskFolder(tmp_path)
    with pytest.raises(InputError, match="exclude each other"):
        MaskFolder(tmp_path, CLASSES, inside=1)


def test_one_mask_is_not_that_of_two_images(tmp_path):
    paint(tmp_path / "1.png", region())
    masks = MaskFolder(tmp_path)
    assert masks.get("photos/cat/1.jpg") is not None
    assert masks.get("1.jpg") is not None
    assert masks.get("/data/photos/cat/1.jpg") is not None
    with pytest.raises(DataError, match=r"1\.png is the mask of photos/cat/1\.jpg, .*photos/dog/1\.jpg"):
        masks.get("photos/dog/1.jpg")


def test_masks_of_each_class_for_images_of_one_name(tmp_path):
    paint(tmp_path / "Bald" / "1.png", region())
    paint(tmp_path / "Smiling" / "1.png", region(rows=slice(2, 4)))
    masks = MaskFolder(tmp_path, CLASSES)
    assert np.array_equal(masks.get_class("photos/Bald/1.jpg", "Bald"), region() / 255)
    assert np.array_equal(masks.get_class("photos/Smiling/1.jpg", "Smiling"), region(rows=slice(2, 4)) / 255)
    with pytest.raises(DataError, match="cannot be that of"):
        masks.get_class("photos/Smiling/1.jpg", "Bald")


def test_an_image_is_not_its_own_mask(tmp_path):
    path = paint(tmp_path / "1.png", region())
    with pytest.raises(DataError, match="is the image itself"):
        MaskFolder(tmp_path).get(path)


def test_an_upright_mask_is_not_squeezed_into_a_wide_size(tmp_path):
    paint(tmp_path / "1.png", region(60, 40))
    with pytest.raises(DataError, match=r"1\.png has 40×60 pixels, but .* 60×40"):
        MaskFolder(tmp_path, size=(40, 60)).get("1.jpg")
    assert MaskFolder(tmp_path, size=32).get("1.jpg").shape == (32, 32)
