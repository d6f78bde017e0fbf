"""Landmarks that are found in images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from attnguide.errors import InputError
from attnguide_action_units._command import landmarks
from attnguide_action_units.extraction import extract


def written(folder: Path, kind: str, points: np.ndarray, names: list[str]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "npz":
        np.savez(path, landmarks=points, names=np.array(names))
    elif kind == "npy":
        np.save(path, points)
    elif kind == "json":
        path.write_text(json.dumps(dict(zip(names, points.tolist(), strict=True))))
    elif kind == "csv":
        rows = [[name, *map(str, row.flatten())] for name, row in zip(names, points, strict=True)]
        path.write_text("\n".join(",".join(row) for row in rows))
    else:  # OpenFace
        header = ["frame", *(f"x_{i}" for i in range(68)), *(f"y_{i}" for i in range(68))]
        rows = [[name, *map(str, row.T.flatten())] for name, row in zip(names, points, strict=True)]
        path = folder / "openface.csv"
        path.write_text("\n".join(", ".join(row) for row in [header, *rows]))
    return path


def test_a_run_survives_an_image_and_refuses_a_bad_name(tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> None:
        raise RuntimeError("a graph has ended")

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table, failures = extract([tmp_path / "a.png"], broken, tmp_path)
    assert failures == {"a.png": "RuntimeError: a graph has ended"}
    assert table.points.isnan().all()
    for out in ("faces.csv", "nowhere/faces.npz"):
        done = CliRunner().invoke(landmarks, [str(tmp_path), "--out", str(tmp_path / out)])
        assert isinstance(done.exception, InputError)
        assert "--out" in str(done.exception)
