"""The benchmarks run, and the documentation shows what they measured."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
def test_coverage_judges_models_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    results = tmp_path / "coverage.jsonl"
    options = ("--models", "test_resnet", "test_vit", "--results", str(results))
    run("coverage.py", *options)
    with results.open("a") as file:
        file.write('{"name": "half a li')  # the run was killed
    records = [json.loads(line) for line in results.read_text().splitlines()[:2]]
    assert [(record["name"], record["verdict"], record["guided"]) for record in records] == [
        ("test_resnet", "right", "yes"),
        ("test_vit", "right", "yes"),
    ]
    assert "| timm | 2 | 2 | 2 | 0 | 0 | 0 | 2 |" in run("coverage.py", *options)
    assert "| test_vit | 160×160 |" in run("coverage.py", "--list", "--results", str(results))
    assert len(results.read_text().splitlines()) == 3


@pytest.mark.nightly
def test_training_is_compared_with_a_loop_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    options = ("--model", "test_resnet", "--images", "4", "--batch", "2", "--side", "64", "--seconds", "1")
    run("training.py", *options, "--out", str(tmp_path / "training.json"))
    found = json.loads((tmp_path / "training.json").read_text())
    for method in ("unguided", "guide", "intervention"):
        assert found[method]["by hand"]["ratio"] == 1
        assert found[method]["attnguide train"]["ratio"] > 0


@pytest.mark.nightly
def test_speed_measures_all_kinds() -> None:
    output = run("speed.py", "--quick", "--threads", "1")
    for kind in (
        "explain",
        "first call",
        "many",
        "guide",
        "memory, explain",
        "memory, many",
        "memory, guide",
    ):
        assert f"\n{kind}\n|" in f"\n{output}", kind


def test_maps_of_action_units() -> None:
    assert "| guided step |" in run("action_units.py", "--quick", "--threads", "1")


def test_steps_with_regions() -> None:
    assert "| SSG | " in run("regions.py", "--quick", "--threads", "1")


@pytest.mark.nightly
def test_multichannel_attention() -> None:
    grids = json.loads(run("multichannel.py", "--quick"))["grids"]
    assert grids["7"]["memory"]["plain"] == 1
    assert grids["4"]["times"]["multi-channel attention"]["ratio"] > 0


@pytest.mark.nightly
def test_effect(tmp_path: Path) -> None:
    digits = tmp_path / "mnist.npz"
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 80, (1000, 28, 28), dtype=np.uint8)
    labels = np.arange(1000) % 10
    np.savez(digits, x_train=pixels, y_train=labels, x_test=pixels[:400], y_test=labels[:400])
    options = ("--quick", "--processes", "1", "--data", str(digits), "--methods", "unguided", "hires_cam")
    records = [json.loads(line) for line in run("effect.py", *options).splitlines()]
    assert {(r["task"], r["method"]) for r in records} == {
        (task, method)
        for task in ("decoy-cdep", "decoy-xil", "faces-lipstick")
        for method in ("unguided", "hires_cam")
    }
    assert all(0 <= r["curve"]["test"][0] <= 1 for r in records)
    assert all(len(r["curve"]["worst"]) == (r["task"] == "faces-lipstick") for r in records)


def test_the_documentation_shows_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("tables", FOLDER / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.syspath_prepend(str(FOLDER))

    def here(command: list[str], **_: Any) -> SimpleNamespace:
        """Run a script in this process, which has torch loaded already."""
        monkeypatch.setattr(sys, "argv", command[1:])
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            runpy.run_path(command[1], run_name="__main__")
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(tables.subprocess, "run", here)
    compared = 0
    for path in sorted(tables.DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        assert tables.filled(page) == page, f"{path} is out of date: run python benchmarks/tables.py"
        compared += len(tables.BLOCK.findall(page))
    assert compared > 5
