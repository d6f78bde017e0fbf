"""Class names as files spell them."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.masks import paint, region
from torch.nn.functional import avg_pool2d

from attnguide.errors import InputError, UnknownNameError
from attnguide.masks import (
    ClassNames,
    load_template,
)
from attnguide.masks.class_names import class_key
from attnguide.masks.sizes import as_size, resize


def test_names_match_across_spellings():
    names = ClassNames(["café_au lait", "b"])
    for name in ("Café au_lait", "cafe\u0301 AU  LAIT", " café_au_lait"):
        assert names.find(name) == "café_au lait"
    assert names.find("caféaulait") is None


@pytest.mark.parametrize("classes", [[], "Bald"])
def test_classes_must_be_names(tmp_path, classes):
    paint(tmp_path / "Bald.png", region())
    with pytest.raises(InputError, match="classes must be"):
        load_template(tmp_path, classes)


def test_spellings_of_one_name() -> None:
    names = ClassNames(["Wearing_Lipstick", "café au lait"])
    for spelling in ("wearing lipstick", " WEARING__LIPSTICK ", "Wearing_Lipstick"):
        assert names.find(spelling) == "Wearing_Lipstick"
    assert names.get("cafe\u0301_au_lait", "a file") == "café au lait"
    assert class_key("a_B  c") == "a b c"
    assert names.find("lipstick") is None
    with pytest.raises(UnknownNameError, match=r"in masks/x\.png.*Wearing_Lipstick"):
        names.get("lipstik", "masks/x.png")
    for wrong in ("cat", []):
        with pytest.raises(InputError, match="sequence of at least one name"):
            ClassNames(wrong)


def test_regions_are_stacked_in_the_order_of_the_classes() -> None:
    region = torch.ones(4, 6)
    stacked = ClassNames(["a", "b"]).stack({"b": region})
    assert stacked.shape == (2, 4, 6)
    assert bool(stacked[0].isnan().all())
    assert torch.equal(stacked[1], region)


def test_smaller_masks_hold_shares_of_their_pixels() -> None:
    mask = (torch.rand(12, 8) > 0.5).float()
    torch.testing.assert_close(resize(mask, (4, 4)), avg_pool2d(mask[None], (3, 2))[0])
    assert torch.equal(resize(mask, (24, 16)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert resize(mask, None) is mask


def test_sizes() -> None:
    assert as_size(5) == (5, 5)
    assert as_size((2, 3)) == (2, 3)
    for wrong in (0, (2, -1)):
        with pytest.raises(InputError):
            as_size(wrong)
