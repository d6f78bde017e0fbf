"""Classes that `--target` chooses, against a sort by hand."""

from __future__ import annotations

import pytest
import torch

from attnguide.errors import InputError, UnknownNameError
from attnguide.models._targets import Target, parse_target

CLASSES = ["hen", "great white", "salt, pepper", "hen"]


def test_the_highest_logits() -> None:
    logits = torch.randn(5, 4)
    pairs = parse_target("top:2", CLASSES, False).of(logits)
    expected = [
        (sample, cls)
        for sample, row in enumerate(logits.tolist())
        for cls in sorted(range(4), key=lambda cls: -row[cls])[:2]
    ]
    assert pairs == expected
    assert parse_target("top:9", CLASSES, False) == Target(None, top=4)


def test_all_positives_of_a_multi_label_model() -> None:
    target = parse_target("predicted", CLASSES, True)
    assert target.needs_logits
    assert target.of(torch.tensor([[1.0, -1, 2, -3], [-2, -1, -3, -4]])) == [(0, 2), (0, 0), (1, 1)]
    single = parse_target("predicted", CLASSES, False)
    assert not single.needs_logits
    assert single.of(None) == "predicted"


def test_names_and_indices() -> None:
    assert parse_target("Great White, 3, 1", CLASSES, False).named == (1, 3)
    assert parse_target("salt, pepper", CLASSES, False).named == (2,)
    with pytest.raises(UnknownNameError, match="great white"):
        parse_target("great whale", CLASSES, False)
    for text, message in (("hen", "0, 3"), ("9", "0 to 3"), (" , ", "empty"), ("top:0", "no class")):
        with pytest.raises(InputError, match=message):
            parse_target(text, CLASSES, False)
