"""Only the first tokens get a graph, and the values are those of PyTorch."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.capture.class_token import FewRows, FirstQueries
from attnguide.capture.model_state import muted

PREFIX = 2


def attention_inputs() -> list[Tensor]:
    return [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def test_the_first_queries_have_pytorchs_values_and_gradients() -> None:
    inputs = attention_inputs()
    expected = F.scaled_dot_product_attention(*inputs)
    with FirstQueries(PREFIX) as mode:
        found = F.scaled_dot_product_attention(*inputs)
    assert mode.calls == 1
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(found[..., :PREFIX, :].square().sum(), inputs, retain_graph=True)
    exact = torch.autograd.grad(expected[..., :PREFIX, :].square().sum(), inputs)
    torch.testing.assert_close(slopes, exact)
    for slope in torch.autograd.grad(found[..., PREFIX:, :].sum(), inputs):
        assert not bool(slope.any())  # the other tokens ask without a graph


def test_blank_rows_show_whether_the_others_matter() -> None:
    inputs = attention_inputs()
    with FirstQueries(PREFIX, blank=True):
        found = F.scaled_dot_product_attention(*inputs)
    assert not bool(found[..., PREFIX:, :].any())
    torch.testing.assert_close(
        found[..., :PREFIX, :], F.scaled_dot_product_attention(*inputs)[..., :PREFIX, :]
    )


@pytest.mark.parametrize("masked", ["mask", "causal"])
def test_masked_attention_is_left_alone(masked: str) -> None:
    inputs = attention_inputs()
    settings = {"is_causal": True} if masked == "causal" else {"attn_mask": torch.ones(7, 7).tril().bool()}
    with FirstQueries(PREFIX) as mode:
        found = F.scaled_dot_product_attention(*inputs, **settings)  # type: ignore[arg-type]
    assert mode.calls == 0
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*inputs, **settings))  # type: ignore[arg-type]


def test_a_module_runs_with_a_graph_for_the_first_tokens_alone() -> None:
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU()).double()
    tokens = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    expected = module(tokens)
    rows = FewRows(PREFIX, False, lambda: False)
    handles = [
        module.register_forward_pre_hook(rows.before, with_kwargs=True),
        module.register_forward_hook(rows.after, with_kwargs=True),
    ]
    found = module(tokens)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.sum(), tokens)
    (exact,) = torch.autograd.grad(expected[:, :PREFIX].sum(), tokens)
    torch.testing.assert_close(slope, exact)
    with muted():  # a probe sees the module as it is
        (slope,) = torch.autograd.grad(module(tokens).sum(), tokens)
    assert bool(slope[:, PREFIX:].any())
    for handle in handles:
        handle.remove()
    assert pickle.loads(pickle.dumps(rows)).is_off()
