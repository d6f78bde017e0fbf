"""`attnguide demo`: what it prints, and where it writes."""

from __future__ import annotations

import sys
from types import ModuleType


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
