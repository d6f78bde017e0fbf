"""Thousands of calls leave nothing behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from tests.helpers.models import batch, cnn

import attnguide as ag


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
