"""Class names as files spell them."""

from __future__ import annotations

import pytest
from tests.helpers.masks import paint, region

from attnguide.errors import InputError
from attnguide.masks import (
    ClassNames,
    load_template,
)


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
