"""The demo, made small: what it writes, and that it does not pretend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from attnguide.commands.demo import story as demo
from attnguide.errors import InputError

FIELDS = {"biased_accuracy", "unbiased_accuracy", "cam_energy_in_mouth", "occlusion_energy_in_mouth"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAIN", 192)
    monkeypatch.setattr(demo, "TEST", 48)
    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "TUNING_EPOCHS", 2)


def test_report_and_result(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    result = demo.run_demo(
        tmp_path / "new" / "out", seed=5, report=lambda stage, done: told.append((stage, done))
    )
    files = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert files == {"report.html", "before_after.png", "result.json"}
    assert json.loads((tmp_path / "new" / "out" / "result.json").read_text()) == result
    for name in ("before", "after", "control"):
        assert set(result[name]) == FIELDS
        assert all(0 <= value <= 1 for value in result[name].values())
    assert result["seconds"] > 0
    shares = [done for _, done in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)

    page = (tmp_path / "new" / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{result['after']['unbiased_accuracy']:.1%}" in page
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert len(sources) % 3 == 0
    assert len(sources) >= 30
    assert all(source.startswith("data:image/png;base64,") for source in sources)  # nothing else to load
    assert "http" not in page


@pytest.mark.nightly
def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = demo.run_demo(tmp_path / "a", seed=3)
    second = demo.run_demo(tmp_path / "b", seed=3)
    other = demo.run_demo(tmp_path / "c", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("before", "after", "control"):
        assert first[name] == pytest.approx(second[name], abs=0.02)
    assert first["before"] != other["before"]


def test_an_interrupted_run_keeps_the_result_before_it(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("old")

    def interrupt(stage: str, done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the folder"):
        demo.run_demo(tmp_path / "file" / "out")
