"""The index lists what is complete, and a later run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnguide.commands.explain.index import Index, writing
from attnguide.commands.explain.reserving import SCRATCH
from attnguide.errors import DataError, InputError

SETTINGS = {"model": "m", "layer": ["a", "b"]}


def line(folder: Path, name: str) -> dict[str, Any]:
    (folder / f"{name}.png").touch()
    return {"image": f"/in/{name}.jpg", "name": name, "files": [f"{name}.png"], "score": 0.5}


def test_a_run_is_resumed_where_files_are_complete(tmp_path: Path) -> None:
    index = Index(tmp_path, SETTINGS, resume=False)
    index.begin()
    index.add([line(tmp_path, "one"), line(tmp_path, "two")])
    index.write()
    written = [json.loads(text) for text in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert written == index.lines
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    (tmp_path / "two.png").unlink()
    again = Index(tmp_path, SETTINGS, resume=True)
    assert again.names == {"/in/one.jpg": "one"}
    assert Index(tmp_path, SETTINGS, resume=False).lines == []


def test_other_settings_and_damaged_files(tmp_path: Path) -> None:
    index = Index(tmp_path, SETTINGS, resume=False)
    index.begin()
    index.add([line(tmp_path, "one")])
    index.write()
    with pytest.raises(InputError, match="model was 'm' and is 'n'"):
        Index(tmp_path, {**SETTINGS, "model": "n"}, resume=True)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"image": 3')
    with pytest.raises(DataError, match="line 2"):
        Index(tmp_path, SETTINGS, resume=True)


def test_writing_makes_folders_and_leaves_nothing_half(tmp_path: Path) -> None:
    with writing(tmp_path, "a/b.txt") as temporary:
        temporary.write_text("whole")
    with pytest.raises(InputError, match="cannot write"), writing(tmp_path, "a/b.txt"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    assert list((tmp_path / SCRATCH).iterdir()) == []


def test_an_image_is_done_when_all_of_its_maps_are_listed(tmp_path: Path) -> None:
    index = Index(tmp_path, SETTINGS, resume=False)
    index.begin()
    for name in ("one", "two"):
        index.add([{**line(tmp_path, name), "files": [f"{name}.png"], "class": cls} for cls in range(3)])
    index.write()
    texts = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_text("".join(texts[:4]))
    assert Index(tmp_path, SETTINGS, resume=True).names == {"/in/one.jpg": "one"}


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../../etc/passwd.png"]},
        {"files": ["/etc/passwd.png"]},
        {"files": ["one.txt"]},
        {"files": [3]},
        {"files": []},
        {"files": "one.png"},
        {"score": "high"},
        {"score": float("nan")},
        {"class_name": 3},
        {"image": None},
        {"name": ["one"]},
    ],
)
def test_an_edited_line_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    index = Index(tmp_path, SETTINGS, resume=False)
    index.begin()
    (tmp_path / "index.jsonl").write_text(json.dumps({**line(tmp_path, "one"), **change}))
    with pytest.raises(DataError, match=r"index\.jsonl, line 1, was not written by attnguide"):
        Index(tmp_path, SETTINGS, resume=True)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"image"', "{}", "[" * 100_000])
def test_a_line_of_another_kind_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"index\.jsonl, line 1, was not written by attnguide"):
        Index(tmp_path, SETTINGS, resume=True)
