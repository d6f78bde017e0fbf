"""Which modules attend among all tokens, and which tokens the logits depend on."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit

from attnguide.errors import LayerError
from attnguide.layers import find_attention
from attnguide.testing import hooks

IMAGES = batch()[0]


@pytest.mark.parametrize(("pool", "readers"), [("token", [0]), ("avg", list(range(1, 17)))])
def test_the_tokens_that_the_logits_depend_on(pool: str, readers: list[int]) -> None:
    model = tiny_vit(depth=3, global_pool=pool).eval()
    attending = find_attention(model, IMAGES, 17)
    assert attending.modules == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert list(attending.readers) == readers
    assert find_attention(model, IMAGES, 17) is attending  # looked for once
    assert hooks(model) == {}
    # By hand: of which tokens behind the last block the logits have a gradient.
    tokens = model.forward_features(IMAGES[:1]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(tokens).square().sum(), tokens)
    assert gradient.abs().sum(dim=(0, 2)).nonzero()[:, 0].tolist() == readers


def test_models_that_cannot_be_read() -> None:
    with pytest.raises(LayerError, match="no attention among all of its 17 tokens"):
        find_attention(cnn().eval(), IMAGES, 17)
    model = tiny_vit()
    model.set_grad_checkpointing()
    with pytest.raises(LayerError, match="checkpoints activations"):
        find_attention(model, IMAGES, 17)
