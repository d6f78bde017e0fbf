"""`attnguide demo` prints the result of the story, and refuses what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from attnguide.commands.demo import story

SHARES = {
    "biased_accuracy": 0.991,
    "unbiased_accuracy": 0.523,
    "cam_energy_in_mouth": 0.084,
    "occlusion_energy_in_mouth": 0.071,
}


def test_the_table_shows_before_and_after(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def told(out: Path, *, seed: int, report: Callable[[str, float], None]) -> dict[str, Any]:
        asked.extend([out, seed])
        report("training", 0.5)
        return {"before": SHARES, "after": dict.fromkeys(SHARES, 1.0), "seconds": 12.3}

    monkeypatch.setattr(story, "run_demo", told)
    printed = call("demo", "--out", tmp_path / "new", "--seed", 7).stdout
    assert asked == [tmp_path / "new", 7]
    for share in ("99.1%", "52.3%", "8.4%", "7.1%"):
        (row,) = (text for text in printed.splitlines() if share in text)
        assert "100.0%" in row
    assert f"12 s. Report: {tmp_path / 'new' / 'report.html'}" in printed


def test_a_folder_that_cannot_be_made(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to the folder" in call("demo", "--out", tmp_path / "file" / "x", status=2).stderr
    assert "Invalid value for '--seed'" in call("demo", "--seed", -1, status=2).stderr
