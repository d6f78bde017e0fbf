"""The images, or the template, that masks are painted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.plugins.gradcam_iou.helpers import invoke, picture

from attnguide.errors import DataError, InputError
from attnguide.models import write_embedded
from attnguide.models.networks import small_cnn
from attnguide_gradcam_iou.painting.sheets import AVERAGED, LONGEST, find_sheets, mean_image


def test_images_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        picture(tmp_path / f"{number}.png", seed=number)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kwargs: opened.append(path) or real(path, **kwargs))
    sheets = find_sheets([str(tmp_path)], None, tmp_path / "masks-of-it")
    assert len(sheets) == 30
    assert not opened
    for number in (3, 3, 4):
        assert sheets.picture(number).size == (40, 30)
    assert [Path(path).name for path in opened] == ["3.png", "4.png"]
    for number in range(30):
        sheets.picture(number)
    assert len(sheets._kept) == 4


def test_large_images_are_painted_smaller(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (10, 3 * LONGEST))
    assert find_sheets([str(tmp_path / "a.png")], None, tmp_path / "masks-of-it").picture(0).size == (
        LONGEST,
        3,
    )


def test_the_mean_of_images(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    mean, skipped = mean_image([*paths, tmp_path / "broken.png"])
    values = np.mean([np.asarray(Image.open(path), dtype=float) for path in paths], axis=0)
    assert np.abs(np.asarray(mean, dtype=float) - values).max() <= 0.5
    assert skipped == 1
    assert (
        find_sheets([str(tmp_path)], "average", tmp_path / "masks-of-it").about
        == "average of 3 images (1 could not be read)"
    )
    assert AVERAGED == 200
    with pytest.raises(DataError, match=r"none of the 1 images.*broken"):
        mean_image([tmp_path / "broken.png"])


def test_what_cannot_be_painted_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to paint on"):
        find_sheets([], None, tmp_path / "masks-of-it")
    with pytest.raises(InputError, match="mean of images"):
        find_sheets([], "average", tmp_path / "masks-of-it")
    picture(tmp_path / "a" / "one.png")
    picture(tmp_path / "b" / "one.jpg")
    with pytest.raises(InputError, match=r"one\.png and .*one\.jpg would share one mask"):
        find_sheets([str(tmp_path)], None, tmp_path / "masks-of-it")


def test_what_lies_where_the_masks_go_is_no_image(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "one.png")
    picture(tmp_path / "photos" / "masks" / "one.png")
    sheets = find_sheets([str(tmp_path / "photos")], None, tmp_path / "photos" / "masks")
    assert [str(path.relative_to(tmp_path)) for path in sheets.paths] == ["photos/one.png"]
    before = (tmp_path / "photos" / "one.png").read_bytes()
    for arguments in (
        (tmp_path / "photos",),
        ("--template", tmp_path / "photos" / "one.png"),
        ("--template", tmp_path / "photos" / "one.png", tmp_path / "photos"),
    ):
        found = invoke(*arguments, "--out", tmp_path / "photos", "--port", "0")
        assert "where the masks go. Choose another --out." in found.output
    checkpoint = tmp_path / "model.safetensors"
    write_embedded(
        checkpoint,
        small_cnn(2, width=8).eval(),
        classes=["a", "b"],
        size=32,
        width=8,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        multi_label=False,
    )
    picture(tmp_path / "train" / "a" / "x.png")
    picture(tmp_path / "train" / "b" / "y.png")
    options = ("--checkpoint", checkpoint, "--data", tmp_path / "train", "--out", tmp_path / "train")
    found = invoke(tmp_path / "photos" / "one.png", *options, "--port", "0")
    assert "of --data lies in" in found.output
    assert (tmp_path / "photos" / "one.png").read_bytes() == before


def test_links_out_of_a_folder_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "one.png")
    picture(tmp_path / "outside.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside.png")
    sheets = find_sheets([str(tmp_path / "in")], None, tmp_path / "masks-of-it")
    assert [path.name for path in sheets.paths] == ["one.png"]
    assert sheets.links == 1
