"""The index lists what is complete, and a later run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnguide.commands.explain.index import Index, check_writable, writing
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
    with writing(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("whole")
    with pytest.raises(InputError, match="cannot write"), writing(tmp_path / "a" / "b.txt"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to the folder"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
