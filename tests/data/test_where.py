"""Conditions as text, against the same conditions in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from attnguide.data._where import condition
from attnguide.errors import InputError, UnknownNameError

ROWS: list[dict[str, Any]] = [
    {"class": name, "score": score, "error": None if score else "it's broken"}
    for name in ("hen", "o'cock", 'say "x"', None)
    for score in (0.0, 0.5, 0.95, -1.5)
]


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("class = 'hen' and score > .9", lambda r: r["class"] == "hen" and r["score"] > 0.9),
        ("class == 'hen' OR score>=0.5", lambda r: r["class"] == "hen" or r["score"] >= 0.5),
        ("not (score < 5e-1)", lambda r: not r["score"] < 0.5),
        ("score <> .5 AND score != .95", lambda r: r["score"] not in (0.5, 0.95)),
        ("class in ('hen', 'cock')", lambda r: r["class"] in ("hen", "cock")),
        ("class in ('hen')", lambda r: r["class"] == "hen"),
        ("class = 'o''cock'", lambda r: r["class"] == "o'cock"),
        ('class = "o\'cock"', lambda r: r["class"] == "o'cock"),
        ("score = -1.5 or 0 < score <= 0.5", lambda r: r["score"] == -1.5 or 0 < r["score"] <= 0.5),
        ("class is null", lambda r: r["class"] is None),
        ("error is not null and class is not null", lambda r: r["error"] and r["class"]),
    ],
)
def test_a_condition_chooses_what_python_does(text: str, python: Callable[[dict[str, Any]], bool]) -> None:
    chosen = pa.Table.from_pylist(ROWS).filter(condition(text, [*ROWS[0]])).to_pylist()
    assert chosen == [row for row in ROWS if python(row)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "score",
        "score >",
        "score > .9 and",
        "score = null",
        "f(score)",
        "score > 1; 2",
        "(" * 200,
        "1",
        "class is 3",
    ],
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(InputError, match="is not understood"):
        condition(text, [*ROWS[0]])


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown column 'scores'. Did you mean 'score'"):
        condition("scores > 1", [*ROWS[0]])
