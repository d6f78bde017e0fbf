"""The rules by which λ and the epoch are chosen."""

from __future__ import annotations

import pytest

from attnguide.errors import InputError
from attnguide.training import Tried, choose_epoch, choose_weight


def test_the_largest_weight_within_one_error_of_the_best() -> None:
    tried = [Tried(0, 0.70, 0.02), Tried(1, 0.90, 0.01), Tried(10, 0.895, 0.05), Tried(100, 0.88, 0.05)]
    assert choose_weight(tried).weight == 10
    assert choose_weight(tried[:2]).weight == 1
    assert choose_weight([Tried(1, 0.5, 0.0), Tried(2, 0.5, 0.0)]).weight == 2
    assert choose_weight([Tried(0, 0.9, 0.01), Tried(1, 0.7, 0.5)]).weight == 0


def test_the_first_of_the_best_epochs() -> None:
    assert choose_epoch([0.5, 0.8, 0.8, 0.7]) == 1
    assert choose_epoch([None, float("nan"), 0.1]) == 2
    assert choose_epoch([None]) == 0


def test_nothing_to_choose_from() -> None:
    with pytest.raises(InputError, match="no λ"):
        choose_weight([])
    with pytest.raises(InputError, match="no epoch"):
        choose_epoch([])
