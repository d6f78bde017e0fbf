"""The notebooks run from top to bottom, offline, and show what they are there to show."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tests.docs.pages import ROOT
from tests.helpers.real_data import RealData

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
#: Pictures and tables that each shows, at least.
SHOWN = {"explain.ipynb": {"image/png": 4}, "guide.ipynb": {"image/png": 1, "text/html": 3}}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: RealData) -> None:
    # The pretrained network where it is at hand, else the embedded one.
    weights = real_data.folder and real_data.folder / "weights/tf_efficientnet_lite0.safetensors"
    monkeypatch.setenv("ATTNGUIDE_WEIGHTS", str(weights or "missing.safetensors"))
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / name) for name in ("src", "plugins")))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = [
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    ]
    for kind, count in SHOWN[path.name].items():
        assert shown.count(kind) >= count, f"{path.name} shows {shown.count(kind)} {kind}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    """Outputs would fill the repository, and name the folders of whoever ran them."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []
