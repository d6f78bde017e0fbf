"""Legends of every format say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnguide.errors import DataError, InputError
from attnguide.masks.legends import LegendEntry, find_legend, read_legend

TEXTS = {
    "json": '{"1": "cat", "#00ff7F": ["dog", "red fox"], "0": []}',
    "toml": '1 = "cat"\n"#00ff7F" = ["dog", "red fox"]\n0 = []\n',
    "csv": "value,class\n1,cat\n#00ff7F, dog, red fox\n0\n",
}


@pytest.mark.parametrize("suffix", TEXTS)
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"legend.{suffix}"
    path.write_text(TEXTS[suffix])
    assert read_legend(path) == [
        LegendEntry("1", False, 1, ("cat",)),
        LegendEntry("#00ff7F", True, 0x00FF7F, ("dog", "red fox")),
        LegendEntry("0", False, 0, ()),
    ]


def test_the_legend_of_the_templates_name_comes_first(tmp_path: Path) -> None:
    template = tmp_path / "regions.png"
    with pytest.raises(DataError, match=r"has no legend.*regions\.json"):
        find_legend(template)
    (tmp_path / "legend.toml").touch()
    assert find_legend(template).name == "legend.toml"
    (tmp_path / "regions.csv").touch()
    assert find_legend(template).name == "regions.csv"
    (tmp_path / "regions.json").touch()
    with pytest.raises(DataError, match="has 2 legends"):
        find_legend(template)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("legend.json", "{}", DataError),
        ("legend.json", '{"70000": "cat", "x": 1}', DataError),
        ("legend.json", '{"#00ff7": "cat"}', DataError),
        ("legend.json", '{"1": 3}', DataError),
        ("legend.toml", "1 = ", DataError),
        ("legend.yaml", "1: cat", InputError),
    ],
)
def test_legends_that_cannot_be_read(name: str, text: str, kind: type[Exception], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=name.replace(".", r"\.")):
        read_legend(tmp_path / name)
