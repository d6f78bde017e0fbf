"""The published networks for attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnguide_segmentation.network import JointNetwork, attribute_network
from attnguide_segmentation.parsing import parsing_loss


def test_the_basic_network_has_twelve_convolutions_and_24_million_weights() -> None:
    network = attribute_network(40)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 12
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(24e6, rel=0.02)
    small = attribute_network(5, width=4).eval()
    assert small(torch.rand(2, 3, 50, 40)).shape == (2, 5)
    features = small[:-3](torch.rand(1, 3, 218, 178))
    assert features.shape == (1, 64, 14, 12)


def test_both_tasks_move_what_they_share() -> None:
    network = JointNetwork(3, width=4)
    logits, scores = network(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    shared = network.parser.encoder[0][0].weight  # type: ignore[index, union-attr]
    assert shared is network.attributes.block1[0].weight  # type: ignore[index, union-attr]
    for loss in (logits.sum(), parsing_loss(scores, torch.zeros(2, 32, 32).long())):
        (gradient,) = torch.autograd.grad(loss, shared, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert len(set(network.parameters())) == len(list(network.parameters()))
