"""The actors of Ray: called by hand, and by Ray itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
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


def by_ray(data: Any, out: Path) -> ag.DatasetReport:
    """Explain by actors of a Ray that is started for it, on two processors."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        return ag.explain_dataset(data, out, targets="top:1", rows=2, engine="ray", progress=False)
    finally:
        ray.shutdown()


def check_each_image_once(out: Path) -> None:
    assert [row.key for row in ag.read_maps(out)] == [str(index) for index in range(20)]
    parts = [f"part-{part:06}.parquet" for part in range(10)]
    assert sorted(file.name for file in out.iterdir()) == [*parts, "settings.json"]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its settings
def test_an_actor_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    report = by_ray(Killing(tmp_path / "mark"), tmp_path / "maps")
    assert (tmp_path / "mark").exists()
    assert (report.parts, report.images, report.failed, report.missing) == (10, 20, 0, 0)
    check_each_image_once(tmp_path / "maps")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_driver_that_is_killed_goes_on_by_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    data, out = Waiting(tmp_path / "mark"), tmp_path / "maps"
    driver = multiprocessing.get_context("spawn").Process(target=by_ray, args=(data, out))
    driver.start()
    patience = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 5 and time.monotonic() < patience and driver.is_alive():
        time.sleep(0.1)
    driver.kill()
    driver.join()
    done = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
    assert len(done) == 5
    (tmp_path / "go").touch()  # another mark, so that no actor of the first driver finishes its part
    report = by_ray(Waiting(tmp_path / "go"), out)
    assert (report.parts, report.images, report.failed, report.missing) == (5, 10, 0, 0)
    assert all(part.stat().st_mtime_ns == when for part, when in done.items())
    check_each_image_once(out)


class Marked:
    """A data set of pictures, which does something at one of them until there is a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Image.Image:
        if index >= 11 and not self.mark.exists():
            self.happen()
        return Image.fromarray(pixels(index))

    def happen(self) -> None:
        raise NotImplementedError


class Killing(Marked):
    """Kills whoever comes first."""

    def happen(self) -> None:
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Waiting(Marked):
    """Waits, at most a minute."""

    def happen(self) -> None:
        patience = time.monotonic() + 60
        while not self.mark.exists() and time.monotonic() < patience:
            time.sleep(0.1)
