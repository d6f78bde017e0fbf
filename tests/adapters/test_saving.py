"""Files of adapters: their settings are read, and what they do not hold is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit

from attnguide.adapters import SavedAdapters, feature_sizes
from attnguide.errors import DataError
from attnguide.testing import snapshot


def written(path: Path, about: object) -> Path:
    save_file({"0.weight": torch.ones(2)}, path, metadata={"adapters": json.dumps(about)})
    return path


def test_settings_are_those_in_the_file(tmp_path: Path) -> None:
    about = [{"kind": "ssp", "channels": 8}, {"kind": "mine"}]
    saved = SavedAdapters(written(tmp_path / "a.safetensors", about))
    assert saved.settings == about
    with pytest.raises(DataError, match=r"a\.safetensors holds an adapter 'ssp'; expected other"):
        saved.make(["other"])


@pytest.mark.parametrize("about", [{"kind": "ssp"}, [{"channels": 8}], 3])
def test_files_that_hold_no_adapters(about: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.safetensors does not hold adapters"):
        SavedAdapters(written(tmp_path / "a.safetensors", about))


def test_other_files(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("plain.safetensors", "text.safetensors", "nowhere.safetensors"):
        with pytest.raises(DataError, match=name):
            SavedAdapters(tmp_path / name)


def test_sizes_that_an_adapter_has_to_fit() -> None:
    images = batch()[0]
    for model, layer, channels in ((cnn(), "block2", 8), (cnn(), "auto", 16), (tiny_vit(), "auto", 12)):
        model.train()
        before = snapshot(model)
        assert feature_sizes(model, images, layer) == (channels, CLASSES)
        assert {**snapshot(model), "process": 0} == {**before, "process": 0}
