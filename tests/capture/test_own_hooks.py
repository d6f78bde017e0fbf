"""The library knows its own hooks from those of others."""

from __future__ import annotations

import pytest
from tests.helpers.models import cnn
from torch.nn.modules.module import register_module_forward_hook

from attnguide.capture.own_hooks import Handles, is_observed
from attnguide.testing import hooks

KINDS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_others_are_noticed(kind: str) -> None:
    model = cnn()
    assert not is_observed(model.modules())
    handle = getattr(model.block2, kind)(lambda *_: None)
    assert is_observed(model.modules())
    assert not is_observed([model.block1])
    handle.remove()
    assert not is_observed(model.modules())


def test_own_hooks_do_not_count() -> None:
    model, mine, of_another_guide = cnn(), Handles(), Handles()
    mine.keep(model.block2.register_forward_hook(lambda *_: None))
    of_another_guide.keep(model.block3.register_forward_hook(lambda *_: None))
    assert not is_observed(model.modules())
    assert is_observed(model.modules(), mine.ids)  # the other guide's
    of_another_guide.remove()
    assert not is_observed(model.modules(), mine.ids)
    mine.remove()
    mine.remove()
    assert mine.ids == set()
    assert hooks(model) == {}


def test_hooks_on_all_modules_count() -> None:
    model = cnn()
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert is_observed(model.modules())
    finally:
        handle.remove()
    assert not is_observed(model.modules())
