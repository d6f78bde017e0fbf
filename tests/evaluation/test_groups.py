"""Groups of images are read from CSV and from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnguide.errors import DataError, InputError
from attnguide.evaluation.groups import read_groups

GROUPS = {"cat/1.png": "indoors", "cat/2.png": "outdoors", "dog/3.png": "7"}


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(
        json.dumps({"cat//1.png": "indoors", "cat/2.png": " outdoors", "dog/3.png": 7})
    )
    rows = "".join(f"{file}, {group}\n" for file, group in GROUPS.items())
    (tmp_path / "plain.csv").write_text(rows)
    (tmp_path / "headed.csv").write_text(f"file,group\n{rows}\n")
    for name in ("g.json", "plain.csv", "headed.csv"):
        assert list(read_groups(tmp_path / name).items()) == list(GROUPS.items())


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("g.csv", "a.png,x\n./a.png,y\n", DataError, "two groups, 'x' and 'y'"),
        ("g.csv", "file,group\n", DataError, "names no image"),
        ("g.csv", "a.png\n", DataError, "a file and its group"),
        ("g.json", '{"a.png": " "}', DataError, "must be a name"),
        ("g.json", "[1]", DataError, "got a list"),
        ("g.txt", "a.png x", InputError, r"'\.txt'"),
    ],
)
def test_files_that_are_refused(
    name: str, text: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=message):
        read_groups(tmp_path / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables_of_spreadsheets_and_of_windows(tmp_path: Path, delimiter: str, end: str, mark: bytes) -> None:
    rows = [("file", "group"), ("cat\\1.png", "indoors"), ("cat/2.png", '"out, or ""in"""'), ("", "")]
    text = "".join(delimiter.join(row) + end for row in rows)
    path = tmp_path / "groups.csv"
    path.write_bytes(mark + text.encode())
    assert read_groups(path) == {"cat/1.png": "indoors", "cat/2.png": 'out, or "in"'}
    path.write_bytes(mark + text.partition(end)[2].encode())  # without headings
    assert read_groups(path) == {"cat/1.png": "indoors", "cat/2.png": 'out, or "in"'}
