"""Every registered part, those of installed plugins too, is held to the contract of all parts."""

from __future__ import annotations

from typing import Any

import pytest

import attnguide as ag
from attnguide import _contract
from attnguide._contract import *  # noqa: F403
from attnguide._contract import Mined, _beside, batch, restore
from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import registry

__all__ = ["_beside"]

NAMES = {kind: registry().names(kind) for kind in KINDS}
# Those of other libraries have tests of their own; here one stands for each kind of them.
FOREIGN = (
    "captum:IntegratedGradients",
    "captum:LayerGradientShap",
    "cam:EigenGradCAM",
    "zennit:GuidedBackprop",
)
NAMES["source"] = [name for name in NAMES["source"] if ":" not in name or name in FOREIGN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    guided = list(_contract.combined(NAMES["source"], NAMES["prior"], NAMES["loss"]))
    _contract.generate(metafunc, NAMES, guided)


@pytest.mark.parametrize(
    "bad",
    [
        {"layer": "body.nowhere"},
        {"source": "grad_kam"},
        {"prior": "masc"},
        {"loss": "iuo"},
        {"weight": float("nan")},
        {"targets": "labells"},
        {"terms": [ag.Term(evidence="logits")]},
        {"terms": [ag.Term(), ag.Term(layer="body.nowhere")]},
        {"terms": []},
    ],
)
def test_a_guide_that_cannot_be_built_leaves_nothing(model: Mined, bad: dict[str, Any]) -> None:
    with pytest.raises(ag.AttnGuideError):
        ag.Guide(model, **bad)


def test_removing_twice_is_fine_and_several_guides_do_not_mix(model: Mined) -> None:
    images, labels, masks = batch()
    model.eval()
    first, second = ag.Guide(model, loss="mse"), ag.Guide(model, loss="cosine")
    model(images)
    values = [float(guide.loss(labels, mask=masks).detach()) for guide in (first, second)]
    first.remove()
    first.remove()
    model(images)
    assert float(second.loss(labels, mask=masks).detach()) == pytest.approx(values[1], rel=1e-5)
    second.remove()
    with ag.Guide(model, loss="mse") as alone:
        model(images)
        assert float(alone.loss(labels, mask=masks).detach()) == pytest.approx(values[0], rel=1e-5)
    restore(model)
