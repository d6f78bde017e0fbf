"""Templates whose values a legend explains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.helpers.masks import CLASSES, paint, write

from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.masks import (
    load_template,
)
from attnguide.masks.legends import LegendEntry, find_legend, read_legend

LABELS = np.array([[0, 1, 1, 2], [0, 3, 3, 2]])
PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]
LEGENDS = {
    ".json": '{"1": "smiling", "2": ["Bald", "Smiling"], "3": "wearing lipstick", "0": []}',
    ".toml": '1 = "smiling"\n2 = ["Bald", "Smiling"]\n3 = "wearing lipstick"\n',
    ".csv": "value,class\n1,smiling\n2,Bald,Smiling\n3, wearing lipstick\n0,\n\n",
}


def palette_image():
    image = Image.fromarray(LABELS.astype(np.uint8))
    image.putpalette(PALETTE)
    return image


def check_labels(template):
    assert template.painted == tuple(CLASSES)
    assert np.array_equal(template.masks[0], np.isin(LABELS, (1, 2)))
    assert np.array_equal(template.masks[1], LABELS == 3)
    assert np.array_equal(template.masks[2], LABELS == 2)


@pytest.mark.parametrize("suffix", LEGENDS)
@pytest.mark.parametrize("stem", ["face", "legend"])
def test_indexed_template(tmp_path, suffix, stem):
    write(tmp_path / f"{stem}{suffix}", LEGENDS[suffix])
    check_labels(load_template(paint(tmp_path / "face.png", palette_image()), CLASSES))
    check_labels(load_template(paint(tmp_path / "face.png", LABELS), CLASSES))
    deep = Image.fromarray(LABELS.astype(np.uint16))
    check_labels(load_template(paint(tmp_path / "face.png", deep), CLASSES))


def test_legend_of_the_same_name_comes_first(tmp_path):
    template = paint(tmp_path / "face.png", LABELS)
    write(tmp_path / "legend.json", {"1": "Bald"})
    write(tmp_path / "face.json", LEGENDS[".json"])
    check_labels(load_template(template, CLASSES))
    given = load_template(template, CLASSES, legend=tmp_path / "legend.json")
    assert given.painted == ("Bald",)
    write(tmp_path / "face.csv", LEGENDS[".csv"])
    with pytest.raises(DataError, match="2 legends"):
        load_template(template, CLASSES)


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA"])
def test_colours(tmp_path, mode):
    write(
        tmp_path / "face.json", {"#ff0000": "smiling", "#00FF00": ["Bald", "smiling"], "#0000ff": CLASSES[1]}
    )
    check_labels(load_template(paint(tmp_path / "face.png", palette_image(), mode), CLASSES))


def test_colours_and_indices_together(tmp_path):
    write(tmp_path / "face.json", {"1": "smiling", "#00ff00": ["Bald", "smiling"], "3": CLASSES[1]})
    check_labels(load_template(paint(tmp_path / "face.png", palette_image()), CLASSES))


def test_transparent_pixels_have_no_colour(tmp_path):
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]])
    write(tmp_path / "face.json", {"#000000": "Bald"})
    masks, _ = load_template(paint(tmp_path / "face.png", rgba), CLASSES)
    assert masks[2].tolist() == [[1, 0]]


@pytest.mark.parametrize("suffix", [".json", ".toml", ".csv"])
def test_unknown_class_in_a_legend(tmp_path, suffix):
    write(tmp_path / f"face{suffix}", LEGENDS[suffix].replace("Bald", "Bold"))
    with pytest.raises(UnknownNameError, match=rf"face{suffix}, entry '2'.*Did you mean 'Bald'"):
        load_template(paint(tmp_path / "face.png", LABELS), CLASSES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("face.json", "[]", "must map"),
        ("face.json", "{}", "without entries"),
        ("face.json", '{"1": 2}', "'1' must name a class"),
        ("face.json", '{"1": null}', "'1' must name a class"),
        ("face.json", '{"1": "Bald", "1": "Smiling"}', "'1' occurs twice"),
        ("face.json", '{"one": "Bald"}', "'one' is neither"),
        ("face.json", '{"-1": "Bald"}', "'-1' is neither"),
        ("face.json", '{"#ff": "Bald"}', "'#ff' is neither"),
        ("face.json", '{"0": []}', "names no class"),
        ("face.json", '{"9": "Bald"}', "region of 'Bald' is empty: no pixel has the value 9"),
        ("face.json", '{"#123456": "Bald"}', "region of 'Bald' is empty"),
        ("face.toml", "1 = ", "not valid TOML"),
        ("face.toml", "a = 1979-05-27", "'a' is neither"),
        ("face.csv", "value,class\n", "without entries"),
        ("face.csv", "value,class\nx,Bald\n", "'x' is neither"),
    ],
)
def test_malformed_legends(tmp_path, name, text, message):
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as error:
        load_template(paint(tmp_path / "face.png", LABELS), CLASSES)
    assert str(tmp_path / name) in str(error.value)


def test_legends_that_do_not_fit(tmp_path):
    template = paint(tmp_path / "face.png", LABELS)
    with pytest.raises(DataError, match=r"has no legend. Write .*face\.json"):
        load_template(template, CLASSES)
    with pytest.raises(InputError, match=r"\.yaml"):
        load_template(template, CLASSES, legend=tmp_path / "face.yaml")
    write(tmp_path / "face.json", LEGENDS[".json"])
    with pytest.raises(DataError, match="is a colour image"):
        load_template(paint(template, palette_image(), "RGB"), CLASSES)
    write(tmp_path / "face.json", {"#ffffff": "Bald"})
    with pytest.raises(DataError, match="has no colours"):
        load_template(paint(template, Image.fromarray(LABELS.astype(np.uint16))), CLASSES)


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
