"""`attnguide layers` and the wrapper of `attnguide demo`."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest


def test_layers_of_a_convolutional_network(call):
    text = call("layers", "test_resnet").stdout
    chosen = next(line for line in text.splitlines() if line.startswith("▶"))
    assert "layer4" in chosen
    assert "nchw 5×5, measured" in text
    assert "assumed" in call("layers", "test_resnet", "--no-measure").stdout
    rows = json.loads(call("layers", "test_resnet", "--json").stdout)
    assert [row["chosen"] for row in rows].count(True) == 1
    assert len({tuple(row["grid"]) for row in rows}) == len(rows)
    every = json.loads(call("layers", "test_resnet", "--json", "--all").stdout)
    assert len(every) == sum(row["layers"] for row in rows)
    assert [row["name"] for row in every if row["chosen"]] == [row["name"] for row in rows if row["chosen"]]


def test_layers_of_a_transformer_are_blocks(call):
    rows = json.loads(call("layers", "test_vit", "--json").stdout)
    assert [row["layout"] for row in rows[1:]] == ["tokens"] * (len(rows) - 1)
    assert next(row for row in rows if row["chosen"])["prefix"] == 1
    assert rows[-1]["usable"] is False


def test_layers_of_another_size(call, faces):
    rows = json.loads(call("layers", "--checkpoint", faces, "--size", "64x96", "--json").stdout)
    assert rows[-1]["grid"] == [8, 12]
    assert rows[-1]["chosen"]


@pytest.mark.parametrize("size", ["0", "a", "1x2x3", "-5", "²", "99999"])
def test_sizes_that_are_none(call, faces, size):
    assert "is no size" in call("layers", "--checkpoint", faces, "--size", size, status=2).stderr


def test_a_size_that_the_model_refuses(call):
    assert (
        "does not take images of --size 96"
        in call("layers", "test_vit_relpos", "--size", "96", status=2).stderr
    )


def test_demo(call, tmp_path, monkeypatch):
    figures = {
        "biased_accuracy": 0.9,
        "unbiased_accuracy": 0.525,
        "cam_energy_in_mouth": 0.1,
        "occlusion_energy_in_mouth": 0.2,
    }
    seen = {}

    def run_demo(out, seed, report):
        seen.update(out=out, seed=seed)
        report("Training", 0.5)
        report("Writing", 1.0)
        return {"before": figures, "after": {**figures, "unbiased_accuracy": 0.875}, "seconds": 41.7}

    module = ModuleType("attnguide.commands.demo.story")
    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "attnguide.commands.demo.story", module)
    result = call("demo", "--out", tmp_path / "demo", "--seed", 5)
    assert seen == {"out": tmp_path / "demo", "seed": 5}
    assert "52.5%" in result.stdout
    assert "87.5%" in result.stdout
    assert result.stdout.rstrip().endswith(str(tmp_path / "demo" / "report.html"))
    (tmp_path / "file").touch()
    assert "cannot write" in call("demo", "--out", tmp_path / "file", status=2).stderr
