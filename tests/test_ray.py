"""The actors of Ray: called by hand, and by Ray itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnguide as ag
from attnguide import models
from attnguide.errors import InputError
from attnguide.layers import find_layers
from attnguide.ray import Explainer


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{index:03}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.fromarray(pixels(index)).save(path)
    return list(map(str, paths))


def test_a_batch_of_any_column(photos: list[str], tmp_path: Path) -> None:
    ag.explain_dataset(photos, tmp_path / "maps", workers=0, progress=False)
    expected = ag.read_maps(tmp_path / "maps").to_arrow()
    loaded = models.load()
    (layer,) = find_layers(loaded.model, loaded.read(photos[0])[None])
    stored = json.loads(json.dumps(layer.to_dict()))
    columns: dict[str, list[Any]] = {
        "path": photos,
        "bytes": [Path(each).read_bytes() for each in photos],
        "image": [pixels(index) for index in range(5)],
    }
    for name, values in columns.items():
        given = np.stack(values) if name == "image" else np.array(values, dtype=object)
        found = Explainer(models.load, layer=stored)({name: given, "key": photos})
        assert found.equals(expected), name


def test_a_batch_with_an_image_that_cannot_be_read(photos: list[str]) -> None:
    rows = Explainer()({"path": [photos[0], "nowhere.png"]}).to_pylist()
    assert [row["key"] for row in rows if row["error"]] == ["nowhere.png"]
    with pytest.raises(InputError, match="has the columns label"):
        Explainer()({"label": [1]})


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its settings
def test_an_actor_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        report = ag.explain_dataset(
            Killing(20, tmp_path / "mark"), tmp_path / "maps", rows=2, engine="ray", progress=False
        )
    finally:
        ray.shutdown()
    assert (report.parts, report.images, report.failed, report.missing) == (10, 20, 0, 0)
    assert list(dict.fromkeys(row.key for row in ag.read_maps(tmp_path / "maps"))) == list(
        map(str, range(20))
    )


class Killing:
    """A data set of pictures, one of which kills whoever asks for it the first time."""

    def __init__(self, count: int, mark: Path) -> None:
        self.count, self.mark = count, mark

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        if index == 11 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.fromarray(pixels(index))
