"""Names of files, and classes by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnguide.commands.explain.names import class_slugs, image_names
from attnguide.errors import InputError, UnknownNameError
from attnguide.models._targets import Target, parse_target


def test_slugs_are_plain_and_different():
    slugs = class_slugs(["Great grey owl", "crane", "crane", "a_b/../c", "", "Ñandú", "crane-2", "x" * 300])
    assert slugs[:6] == ["great-grey-owl", "crane", "crane-2", "a-b-..-c", "class-4", "ñandú"]
    assert slugs[6] == "crane-2-6"
    assert len(slugs[7]) == 60
    assert not [slug for slug in slugs if "_" in slug or "/" in slug]


def test_folders_are_mirrored():
    names = image_names([Path("in/a/1.png"), Path("in/b/1.png"), Path("in/b/c/2.png")], {})
    assert list(names.values()) == ["a/1", "b/1", "b/c/2"]


def test_names_that_meet_get_their_suffix_then_a_number():
    paths = [
        Path("a/1.jpg"),
        Path("a/1.png"),
        Path("a/1-png.tif"),
        Path("a/1.PNG"),
        Path("a/A.png"),
        Path("a/a.png"),
    ]
    names = list(image_names(paths, {}).values())
    assert names[:3] == ["1", "1-png", "1-png-tif"]
    assert len({name.casefold() for name in names}) == len(paths)
    assert names == list(image_names(paths, {}).values())


def test_names_given_before_stay():
    known = {str(Path("a/1.png").absolute()): "1"}
    names = image_names([Path("a/1.png"), Path("b/1.png")], known)
    assert list(names.values()) == ["1", "b/1"]
    # The second folder alone would be called the same.
    assert image_names([Path("b/1.png")], known) == {Path("b/1.png"): "1-png"}


def test_long_names_are_cut_by_bytes():
    (name,) = image_names([Path("ü" * 120 + ".png")], {}).values()
    assert len(name.encode("utf-8", "surrogateescape")) == 150


CLASSES = ("hen", "Great White", "crane", "salt, pepper", "crane")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", Target("all")),
        ("predicted", Target("predicted")),
        ("top:3", Target(None, 3)),
        ("top2", Target(None, 2)),
        ("top:99", Target(None, 5)),
        ("0,3", Target((0, 3))),
        ("great white, HEN , 1", Target((1, 0))),
        ("salt, pepper", Target((3,))),
    ],
)
def test_targets(text, expected):
    assert parse_target(text, CLASSES, multi_label=False) == expected


def test_predicted_of_a_multi_label_model_are_all_positives():
    target = parse_target("predicted", CLASSES, multi_label=True)
    logits = torch.tensor([[1.0, -1, 2, -3, -1], [-5.0, -1, -3, -2, -4]])
    assert target.of(logits) == [(0, 2), (0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("hem", UnknownNameError, "Did you mean 'hen'"),
        ("crane", InputError, "classes 2, 4"),
        ("5", InputError, "classes 0 to 4"),
        ("-1", UnknownNameError, "unknown class '-1'"),
        (" , ", InputError, "empty"),
        ("top:0", InputError, "--target top:0 selects no class"),
        ("²", UnknownNameError, "unknown class"),
    ],
)
def test_targets_that_are_refused(text, error, expected):
    with pytest.raises(error, match=expected):
        parse_target(text, CLASSES, multi_label=False)


def test_top_takes_the_highest_first():
    logits = torch.tensor([[0.0, 3, 1, 2, -1]])
    assert parse_target("top:2", CLASSES, multi_label=False).of(logits) == [(0, 1), (0, 3)]


def test_names_are_on_one_line():
    assert list(image_names([Path("x/a\nb.png"), Path("x/c\u2028\td.png")], {}).values()) == ["a-b", "c--d"]
