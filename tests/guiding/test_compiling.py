"""What comes before a layer is compiled, and what is compiled already is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import CLASSES, batch, cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import GuidanceError, InputError
from attnguide.guiding.compiling import check_uncompiled, compile_before
from attnguide.layers import find_layers


def test_what_was_compiled_in_place_is_explained_but_not_guided() -> None:
    model, images = cnn().eval(), batch()[0]
    plain = ag.explain(model, images)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert torch.equal(ag.explain(model, images).maps, plain.maps)
    assert model._compiled_call_impl is compiled
    with pytest.raises(GuidanceError, match=r"the model was compiled in place.*guide\.compile"):
        ag.Guide(model)
    model._compiled_call_impl = None
    model.block4.compile(backend="eager")
    with ag.Guide(model), pytest.raises(GuidanceError, match=r"module 'block4' was compiled in place"):
        model(images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_comes_before_the_layer_is_compiled() -> None:
    model = cnn().eval()
    images, labels, masks = batch()

    def step() -> tuple[float, Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels) + guide.loss(labels, mask=masks)
        loss.backward()
        return float(loss.detach()), model.block1[0].weight.grad.clone()

    with ag.Guide(model) as guide:
        eager = step()
        assert guide.compile(images, backend="aot_eager") == [
            "block1",
            "block2",
            "block3",
            "block4.0",
            "block4.1",
        ]
        compiled = step()
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        torch.testing.assert_close(compiled[1], eager[1], rtol=1e-4, atol=1e-6)
    assert all(module._compiled_call_impl is None for module in model.modules())
    with pytest.raises(GuidanceError, match="removed"):
        guide.compile(images)


def test_compiling_has_clear_limits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    with ag.Guide(model, layer="0") as guide, pytest.raises(GuidanceError, match="nothing to compile"):
        guide.compile(batch()[0])
    with pytest.raises(InputError, match=r"compiled as a whole.*guide\.compile"):
        ag.Guide(torch.compile(cnn()))


def test_only_modules_with_weights_before_the_layer_are_compiled() -> None:
    model, images = cnn().eval(), batch()[0]
    expected = model(images)
    layers = find_layers(model, images, "block3")
    names = compile_before(model, layers, images, {"backend": "eager"})
    assert names[:2] == ["block1", "block2"]
    assert all(name.startswith(("block1", "block2", "block3.")) for name in names)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == set(names)
    torch.testing.assert_close(model(images), expected)
    check_uncompiled(model, find_layers(model, images, "block4"))  # nothing that holds it is compiled
