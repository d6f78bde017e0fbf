"""A folder of its own for each page, whose modules can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.parts.registry import registry
from attnguide.visual import to_pil


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    registry.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def photos(folder: Path) -> Path:
    """Three drawn faces in the folder `photos`."""
    (folder / "photos").mkdir()
    for index, face in enumerate(ProceduralFaces(3)[i] for i in range(3)):
        to_pil(face.image).save(folder / "photos" / f"{index}.png")
    return folder
