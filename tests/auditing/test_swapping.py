"""Swaps of what is inside and outside of masks, on models whose rule is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnguide.auditing import swapping
from attnguide.pairs import resolve

COUNT = 32


class Rule(nn.Module):
    """Says which class the brightness of the left or of the right half stands for."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left = left

    def forward(self, images: Tensor) -> Tensor:
        half = images[..., :4] if self.left else images[..., 4:]
        value = half.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([value, -value], dim=1)


@pytest.mark.parametrize("left", [True, False])
def test_a_model_follows_the_half_that_its_rule_reads(left: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shades = (torch.rand(COUNT, 2, generator=generator) > 0.5).float()
    images = shades[:, None, None].repeat_interleave(4, dim=3).expand(-1, 3, 8, -1).contiguous()
    model = Rule(left).eval()
    logits = model(images)
    labels = logits.argmax(dim=1)
    masks = torch.zeros(COUNT, 8, 8)
    masks[:, :, :4] = 1  # the left half is where to look
    pairs = resolve("labels", logits, labels)
    result = swapping.swap(model, images, logits, labels, pairs, masks, 16)
    assert torch.equal(result.cls, labels)
    followed, ignored = (result.inside, result.outside) if left else (result.outside, result.inside)
    assert bool((followed == 1).all())
    assert not bool(ignored.any())
    assert not bool(result.chance.any())
