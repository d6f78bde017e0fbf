"""The codebook: what comes along, and files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnguide.data.procedural.faces import EXPRESSION_UNITS
from attnguide.errors import DataError, UnknownNameError
from attnguide_action_units import codebook

#: The Facial Action Coding System, and the expressions, as published with the method.
NAMES = {
    1: "inner brow raiser", 2: "outer brow raiser", 4: "brow lowerer", 5: "upper lid raiser",
    6: "cheek raiser", 7: "lid tightener", 9: "nose wrinkler", 10: "upper lip raiser",
    12: "lip corner puller", 15: "lip corner depressor", 16: "lower lip depressor", 17: "chin raiser",
    20: "lip stretcher", 23: "lip tightener", 24: "lip pressor", 25: "lips part", 26: "jaw drop",
    27: "mouth stretch",
}  # fmt: skip
EXPRESSIONS = {
    "happiness": {6, 12, 25},
    "surprise": {1, 2, 5, 26, 27},
    "fear": {1, 2, 4, 5, 20, 25, 26, 27},
    "anger": {4, 5, 7, 10, 17, 23, 24, 25, 26},
    "disgust": {9, 10, 16, 17, 25, 26},
    "sadness": {1, 4, 6, 15, 17},
    "neutral": set(),
}

GOOD = """
[expressions]
calm = []
doubt = [14]

[[unit]]
number = 14
name = "dimpler"
regions = [{ at = [48], offset = [-0.1, 0], radii = [0.1, 0.1] }]
"""


def test_the_default_is_the_published_one() -> None:
    book = codebook.default()
    assert {number: unit.name for number, unit in book.units.items()} == NAMES
    assert {name: set(units) for name, units in book.expressions.items()} == EXPRESSIONS
    # What drawn faces are made of is what the prior says of them.
    assert {name: set(units) for name, units in EXPRESSION_UNITS.items()} == EXPRESSIONS
    # Units that look alike on a map give their region once.
    assert book.regions([23, 24, 26, 27]) == book.units[27].regions
    with pytest.raises(UnknownNameError, match=r"action unit '3'"):
        book.regions([1, 3])
    with pytest.raises(UnknownNameError, match=r"'joy'"):
        book.units_of("joy")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    book = codebook.load(file)
    assert book.expressions == {"calm": (), "doubt": (14,)}
    (region,) = book.units[14].regions
    assert region == codebook.Region((48,), "at", (0.1, 0.1), (-0.1, 0.0))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("[14]", "[15]", r"expression 'doubt': action unit 15 is not described\. .*Known: 14"),
        ("[14]", "14", "expression 'doubt': 14 must be a list"),
        ("number = 14", 'number = "14"', r"unit 1: number = '14'"),
        ('name = "dimpler"', "", r"unit 1 \(AU14\): name = None"),
        ("at = [48]", "at = [68]", r"AU14\): there is no landmark 68; they run from 0 to 67"),
        ("at = [48]", 'at = ["48"]', r"AU14\): at = \['48'\] must be a list of landmarks"),
        ("at = [48]", "at = [48], around = [48]", "either at = .* or around"),
        ("radii = [0.1, 0.1]", "radii = [0.1, 0]", r"AU14\): radii = \[0.1, 0.0\] must be positive"),
        ("radii = [0.1, 0.1]", "radius = 0.1", r"unknown entry 'radius'\. Did you mean 'radii'"),
        ("offset = [-0.1, 0]", "offset = 0.1", r"offset = 0.1 must be two numbers"),
        ("[[unit]]", "[[units]]", r"unknown entry 'units'\. Did you mean 'unit'"),
        ("[expressions]", "[expressions", "cannot be read as a codebook"),
        ("calm = []\ndoubt = [14]", "", "has no expressions"),
        (GOOD, "[expressions]\ncalm = []", "describes no action unit"),
        (GOOD, GOOD + GOOD[GOOD.index("[[unit]]") :], "unit 2: number 14 is taken"),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, old: str, new: str, match: str) -> None:
    file = tmp_path / "mine.toml"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(DataError, match=match) as caught:
        codebook.load(file)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.toml cannot be read as a codebook"):
        codebook.load(tmp_path / "none.toml")
