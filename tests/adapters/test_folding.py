"""A model and its adapters as one module: the same logits, without hooks, and exportable."""

from __future__ import annotations

import torch
from tests.helpers.models import CLASSES, batch, cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.adapters import Folded
from attnguide.layers import find_layers
from attnguide.testing import hooks


class Bottleneck(ag.Adapter):
    """Adds a linear layer on pooled features to the logits."""

    layer = "block3"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, trace: ag.Trace) -> Tensor:
        return trace.logits + self.linear(trace.at("block3").feature.spatial.mean(dim=(2, 3)))


def test_folded_logits_are_those_by_hand_and_by_hooks() -> None:
    model, images, adapter = cnn().eval(), batch()[0], Bottleneck().eval()
    with torch.no_grad():
        features = model[:3](images)
        expected = model(images) + adapter.linear(features.mean(dim=(2, 3)))
        with ag.Guide(model, terms=[], adapters=[adapter]):
            torch.testing.assert_close(model(images), expected)
        folded = Folded(model, [adapter], find_layers(model, images, "block3")).eval()
        torch.testing.assert_close(folded(images), expected)
    assert hooks(model) == {}
    names = {name for name, _ in folded.named_parameters()}
    assert "adapters.0.linear.weight" in names
    assert "model.head.weight" in names
    program = torch.export.export(folded, (images,))
    torch.testing.assert_close(program.module()(images), expected)


def test_without_adapters_it_is_the_model() -> None:
    model, images = cnn().eval(), batch()[0]
    torch.testing.assert_close(Folded(model, [], [])(images), model(images))
