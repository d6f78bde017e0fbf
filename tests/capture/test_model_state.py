"""Modes are restored exactly, whatever happens inside."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.helpers.models import cnn, tiny_vit
from torch import nn

from attnguide.capture.model_state import (
    empty_caches,
    evaluating,
    modules_of,
    muted,
    muting,
    uncached_autocast,
)
from attnguide.functional import full_precision_mode
from attnguide.testing import snapshot


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_flags_are_restored_one_by_one(error: type[BaseException] | None) -> None:
    model = cnn().train()
    model.block2.eval()
    images = torch.rand(2, 3, 32, 32)
    before = snapshot(model)
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            model(images)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert snapshot(model) == before


def test_compiled_code_is_put_aside_and_back() -> None:
    model = cnn()
    model.block1.compile(backend="eager")
    compiled = model.block1._compiled_call_impl
    with evaluating(model):
        assert model.block1._compiled_call_impl is None
    assert model.block1._compiled_call_impl is compiled


def test_what_modules_keep_is_emptied_and_restored() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].attention_bias_cache = {"cpu": torch.ones(1)}
    with evaluating(model):
        assert model[0].attention_bias_cache == {}
        model[0].attention_bias_cache["cpu"] = torch.zeros(1)
    assert model[0].attention_bias_cache["cpu"].tolist() == [1.0]
    empty_caches(model)
    assert model[0].attention_bias_cache == {}


def test_all_modules_are_visited() -> None:
    model = tiny_vit()
    assert set(modules_of(model)) == set(model.modules())


def test_muting_is_counted_and_of_one_thread() -> None:
    seen: list[bool] = []
    with muted(), muted():
        thread = threading.Thread(target=lambda: seen.append(muting.depth > 0))
        thread.start()
        thread.join()
        assert muting.depth
    assert seen == [False]
    assert not muting.depth


def test_autocast_is_left_and_entered_again() -> None:
    cpu, a, b = torch.device("cpu"), torch.rand(2, 2), torch.rand(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision_mode(cpu):
            assert (a @ b).dtype == torch.float32
        with uncached_autocast(cpu):
            assert (a @ b).dtype == torch.bfloat16
            assert not torch.is_autocast_cache_enabled()
        assert torch.is_autocast_cache_enabled()
    with uncached_autocast(cpu):
        assert (a @ b).dtype == torch.float32
    with full_precision_mode(torch.device("meta")):  # has no autocast to leave
        pass
