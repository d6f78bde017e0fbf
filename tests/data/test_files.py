"""Files are written whole, and read with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnguide.data.files import (
    atomic_write,
    check_file,
    check_target,
    check_writable,
    natural_key,
    read_json,
    read_rows,
    read_text,
)
from attnguide.errors import DataError, InputError


def test_a_file_is_replaced_at_the_end_or_never(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    assert check_target(tmp_path / "new.txt") == tmp_path / "new.txt"
    for path in (tmp_path, tmp_path / "no" / "file.txt", "/dev/null"):
        with pytest.raises(InputError, match="cannot write"):
            check_target(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, message in (
        (tmp_path, "folder"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "empty", "empty"),
    ):
        with pytest.raises(DataError, match=message):
            check_file(path)


def test_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"é": [1, None]}), encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    assert read_text(tmp_path / "a.json").startswith("{")
    (tmp_path / "twice.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(DataError, match="the key 'b' occurs twice"):
        read_json(tmp_path / "twice.json")


def test_numbers_are_sorted_as_numbers() -> None:
    names = ["b/10.png", "b/9.png", "a/100.png", "A/20.png", "b/9a.png"]
    assert sorted(names, key=natural_key) == ["A/20.png", "a/100.png", "b/9.png", "b/9a.png", "b/10.png"]


def test_folders_that_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to the folder"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        check_target(tmp_path / ("x" * 300))


@pytest.mark.parametrize("path", [None, 3, b"x", [], "", "a\0b"])
def test_what_is_not_a_path(path: Any) -> None:
    for function in (check_file, check_target, read_json, read_text):
        with pytest.raises(InputError, match="path="):
            function(path)


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\n a , "b\nc",\n\n,,\n1,2,3\n')
    assert read_rows(path) == [["a", "b\nc", ""], ["1", "2", "3"]]
    path.write_text("a;1,5\n")
    assert read_rows(path) == [["a;1", "5"]]
    path.write_text("a," + "x" * 200_000)
    with pytest.raises(DataError, match=r"a\.csv is not a table of comma-separated values"):
        read_rows(path)
