"""What tests of parts share."""

from __future__ import annotations

import subprocess
import sys

import torch

from attnguide.testing import CLASSES, batch, hooks, snapshot, tiny_cnn, tiny_vit


def test_models_take_the_batch() -> None:
    images, labels, masks = batch()
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3]
    assert bool(masks.flatten(1).any(dim=1).all())
    for model in (tiny_cnn(), tiny_vit()):
        assert model(images).shape == (4, CLASSES)


def test_a_snapshot_sees_what_changes() -> None:
    model = tiny_cnn()
    before = snapshot(model)
    assert snapshot(model) == before
    assert not hooks(model)
    handle = model.register_forward_hook(lambda *_: None)
    assert snapshot(model) != before
    handle.remove()
    assert snapshot(model) == before
    with torch.no_grad():
        next(model.parameters())[0] += 1
    assert snapshot(model) != before


def test_the_plugin_of_pytest_loads_no_torch() -> None:
    code = "import attnguide._pytest, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
