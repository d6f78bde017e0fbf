"""Thousands of calls leave nothing behind, and a file that was changed is not believed."""

from __future__ import annotations

import gc
import json
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.helpers.models import batch, cnn

import attnguide as ag
from attnguide.layers import _memory as memory, find_layers
from attnguide.trace import Layer


def live() -> int:
    # By type(): isinstance asks an object for its class, to which some answer with a warning.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def tensors() -> int:
    gc.collect()
    return live()


def resident() -> float:
    """Memory of the process in MiB."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096 / 2**20


def assert_steady(call: Callable[[], object], times: int = 2000) -> None:
    for _ in range(50):
        call()
    gc.collect()
    tracemalloc.start()
    try:
        count, before, size = tensors(), tracemalloc.get_traced_memory()[0], resident()
        gc.disable()  # reference counting alone must do
        for _ in range(50):
            call()
        fresh = live()
        gc.enable()
        tracemalloc.stop()  # it is slow
        for _ in range(times - 100):
            call()
        tracemalloc.start()
        for _ in range(50):
            call()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
        assert tensors() <= count + 5
        assert fresh <= count + 20, "tensors wait for the garbage collector"
        assert grown < 200_000, before
        assert resident() < size + 20
    finally:
        gc.enable()
        tracemalloc.stop()


@pytest.mark.nightly
@pytest.mark.parametrize("source", ["grad_cam", "layer_attention"])
def test_explain(source: str) -> None:
    model, images = cnn(width=2), torch.rand(2, 3, 16, 16)
    assert_steady(lambda: ag.explain(model, images, source), 2000 if source == "grad_cam" else 300)


@pytest.mark.nightly
def test_guided_steps() -> None:
    model = cnn(width=2)
    images, labels, masks = batch(2, 16)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    guide = ag.Guide(model)

    def step() -> None:
        optimiser.zero_grad()
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels) + guide.loss(labels, mask=masks)
        loss.backward()
        optimiser.step()

    assert_steady(step)


def test_guides_that_come_and_go() -> None:
    model = cnn(width=2)
    images, labels, masks = batch(2, 16)

    def visit() -> None:
        with ag.Guide(model) as guide:
            model(images)
            guide.loss(labels, mask=masks)

    assert_steady(visit, 300)


def test_models_that_come_and_go_are_forgotten() -> None:
    images, labels, masks = batch(2, 16)

    def visit() -> None:
        model = cnn(width=2)
        ag.explain(model, images)
        guide = ag.Guide(model)  # never removed
        model(images)
        guide.loss(labels, mask=masks).backward()

    for _ in range(5):
        visit()
    count = tensors()
    for _ in range(20):
        visit()
    assert tensors() <= count + 5


def test_a_removed_guide_and_a_new_forward_free_the_graph() -> None:
    model = cnn(width=2)
    images, labels, masks = batch(2, 16)
    guide = ag.Guide(model)
    model(images)
    guide.loss(labels, mask=masks)
    count = tensors()
    for _ in range(3):  # forwards without a loss, as in validation
        with torch.no_grad():
            model(images)
    assert tensors() <= count
    guide.remove()
    assert guide.records() == []
    assert tensors() < count


def edited(layer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change fields of a written layer; `layout__grid` is the grid of its layout."""
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        layer = {**layer, outer: {**layer[outer], inner: value} if inner else value}
    return layer


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "layer1"},
        {"name": "nowhere"},
        {"name": 3},
        {"layout__grid": [1, 4]},
        {"layout__grid": [0, 0]},
        {"layout__grid": "ab"},
        {"layout__kind": "nhwc"},
        {"layout__kind": "round"},
        {"layout__order": [3, 2, 1, 0]},
        {"layout__order": [9**9] * 4},
        {"layout__order": list(range(10**6))},
        {"layout__prefix": -1},
        {"layout": None},
        {"how": "guessed"},
        {"spread": "wide"},
        {"shortcuts__pooled": "conv1"},
        {"shortcuts__head": "nowhere"},
        {"shortcuts__rowwise": 5},
        {"more": 1},
    ],
)
def test_an_edited_file_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "attnguide.layers._memory")

    def found() -> Layer:
        memory.forget()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model("resnet10t", num_classes=3)
            return find_layers(model, torch.rand(2, 3, 64, 64))[0]

    layer = found()
    (file,) = (tmp_path / "layers").iterdir()
    whole = file.read_text()
    assert found() == layer
    written = json.loads(whole)
    for text in (
        json.dumps({**written, "layers": [edited(written["layers"][0], **changes)]}),
        json.dumps([edited(written["layers"][0], **changes)]),
    ):
        file.write_text(text)
        caplog.clear()
        assert found() == layer
        assert f"{file} is not used" in caplog.text
        assert file.read_text() == whole


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"null", b"9" * 10_000, b" " * 2**25]
)
def test_a_file_of_another_kind_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path))
    model, images = timm.create_model("resnet10t", num_classes=3), torch.rand(2, 3, 64, 64)
    layer = find_layers(model, images)[0]
    (file,) = (tmp_path / "layers").iterdir()
    file.write_bytes(content)
    memory.forget()
    assert find_layers(timm.create_model("resnet10t", num_classes=3), images)[0].layout == layer.layout


def test_the_file_of_another_question_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path))
    model, images = timm.create_model("resnet10t", num_classes=3), torch.rand(2, 3, 64, 64)
    (last,) = find_layers(model, images)
    (of_last,) = (tmp_path / "layers").iterdir()
    (first,) = find_layers(model, images, "layer1")
    (of_first,) = set((tmp_path / "layers").iterdir()) - {of_last}
    of_last.write_bytes(of_first.read_bytes())
    memory.forget()
    assert find_layers(model, images)[0].name == last.name != first.name
