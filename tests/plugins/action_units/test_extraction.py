"""Landmarks that are found in images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from attnguide.errors import InputError
from attnguide_action_units._command import landmarks
from attnguide_action_units.extraction import extract


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
