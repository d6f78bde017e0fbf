"""The table of the regions that show each attribute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.attributes import CELEBA, attribute_table, load_attributes


def test_every_attribute_of_celeba_has_an_entry() -> None:
    table = attribute_table(CELEBA)
    assert table.shape == (40, 7)
    rows = dict(zip(CELEBA, table.tolist(), strict=True))
    assert rows["Wearing_Lipstick"] == [0, 0, 0, 0, 0, 1, 0]
    assert rows["Black_Hair"] == [0, 1, 0, 0, 0, 0, 0]
    assert rows["Eyeglasses"] == [0, 0, 0, 1, 0, 0, 0]
    assert not any(rows["Attractive"])
    assert torch.equal(
        attribute_table(ProceduralFaces.classes), attribute_table(["Lipstick", *ProceduralFaces.classes[1:]])
    )


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[attributes]\nfreckles = ["nose", "face_skin"]\n')
    assert load_attributes(file) == {"freckles": ("nose", "face_skin")}
    assert attribute_table(["Freckles"], file).nonzero()[:, 1].tolist() == [2, 6]
    with pytest.raises(AttnGuideError, match="attribute 'smile'"):
        attribute_table(["smile"], file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[attributes]\nhat = 3", r"hat = 3 must be a list of regions"),
        ('[attributes]\nhat = ["head"]', "hat names the region 'head'; there are background"),
        ("[regions]", r"no table \[attributes\]"),
        ("[", "cannot be read"),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(AttnGuideError, match=match):
        load_attributes(file)
