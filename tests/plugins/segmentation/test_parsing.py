"""The published parsing network and its loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnguide_segmentation.parsing import ParsingNetwork, parsing_loss


def test_the_network_is_that_of_table_1() -> None:
    network = ParsingNetwork().eval()
    shapes: list[tuple[int, ...]] = []
    for stage in (*network.encoder, *reversed(list(network.decoder))):
        for layer in stage:  # type: ignore[attr-defined]
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        scores = network(torch.rand(1, 3, 218, 178))
    encoder = [(64, 218, 178)] * 2 + [(128, 109, 89)] * 2 + [(256, 55, 45)] * 2 + [(512, 28, 23)] * 2
    decoder = [(512, 28, 23)] * 2 + [(256, 55, 45)] * 2 + [(128, 109, 89)] * 2 + [(64, 218, 178)] * 2
    assert shapes == encoder + decoder
    assert [tuple(one.shape[1:]) for one in scores] == [(7, 28, 23), (7, 55, 45), (7, 109, 89), (7, 218, 178)]


def test_the_loss_is_the_mean_over_the_scales() -> None:
    labels = torch.randint(0, 7, (2, 16, 16))
    scores = [torch.randn(2, 7, side, side) for side in (2, 4, 8, 16)]
    expected = [
        F.cross_entropy(
            one, F.interpolate(labels[:, None].float(), one.shape[-1], mode="nearest-exact")[:, 0].long()
        )
        for one in scores
    ]
    assert parsing_loss(scores, labels).item() == pytest.approx(float(sum(expected)) / 4, rel=1e-5)


def test_weighted_regions_count_more() -> None:
    scores, labels = (torch.randn(2, 7, 8, 8), torch.randn(2, 7, 4, 4)), torch.randint(7, (2, 8, 8))
    weight = torch.rand(7) + 0.1
    expected = []
    for one, step in zip(scores, (1, 2), strict=True):
        # The nearest pixel of a coarser grid is the one right below its centre.
        target = labels[:, step // 2 :: step, step // 2 :: step]
        chosen = one.log_softmax(dim=1).gather(1, target[:, None])[:, 0] * weight[target]
        expected.append(-chosen.sum() / weight[target].sum())
    torch.testing.assert_close(parsing_loss(scores, labels, weight), sum(expected) / 2)
