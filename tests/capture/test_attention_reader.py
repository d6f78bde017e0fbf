"""Attention is read step by step, with the values of PyTorch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.capture.attention_reader import Reading, read
from attnguide.errors import LayerError


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.3}, {"masked": True}])
def test_the_probabilities_are_those_of_the_definition(settings: dict[str, object]) -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    if settings.pop("masked", False):
        settings["attn_mask"] = torch.rand(6, 6) > 0.3
        settings["attn_mask"].fill_diagonal_(True)  # type: ignore[attr-defined]
    expected = F.scaled_dot_product_attention(query, key, value, **settings)  # type: ignore[arg-type]
    seen: list[Tensor] = []

    def note(probabilities: Tensor) -> Tensor:
        seen.append(probabilities)
        return probabilities

    with Reading(note):
        found = F.scaled_dot_product_attention(query, key, value, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    (probabilities,) = seen
    assert probabilities.shape == (2, 4, 6, 6)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(probabilities @ value, expected)


def test_what_is_noted_takes_the_place_of_the_probabilities() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    with Reading(lambda probabilities: torch.full_like(probabilities, 0.2)):
        found = F.scaled_dot_product_attention(query, key, value)
        written_out = (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    torch.testing.assert_close(found, value.mean(dim=-2, keepdim=True).expand_as(value))
    torch.testing.assert_close(written_out, found)


def test_groups_of_heads_share_keys() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    with Reading(lambda probabilities: probabilities):
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, key, enable_gqa=True), expected)


def test_masks_of_multi_head_attention_are_refused() -> None:
    attention, tokens = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 4, 8)
    refused = pytest.raises(LayerError, match=r"cannot read.*grad_cam")
    with Reading(lambda probabilities: probabilities), refused:
        attention(tokens, tokens, tokens, attn_mask=torch.zeros(4, 4))


def test_several_readers_share_one_second_run() -> None:
    class Attend(nn.Module):
        runs = 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.runs += 1
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    module, seen = Attend(), []

    def looker(name: str, probabilities: Tensor) -> Tensor:
        seen.append(name)
        return probabilities

    for name in ("first", "second"):
        module.register_forward_hook(
            partial(read, partial(lambda look: look, partial(looker, name))), with_kwargs=True
        )
    module.register_forward_hook(partial(read, lambda: None), with_kwargs=True)
    module(torch.randn(1, 2, 5, 4))
    assert seen == ["first", "second"]
    assert module.runs == 2
