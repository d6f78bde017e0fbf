"""Attention followed through all blocks, against the published rules written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from tests.helpers.models import batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.capture.attention_reader import Reading
from attnguide.errors import LayerError
from attnguide.layers import find_attention
from attnguide.testing import snapshot


@contextmanager
def probabilities(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each block of a timm transformer attends to, read where dropout would be."""
    seen: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _m, _a, output: seen.append(output)))
    yield seen
    for block, hook in zip(model.blocks, hooks, strict=True):
        block.attn.fused_attn = True
        hook.remove()


def rolled_out(seen: list[Tensor], row: int | slice) -> Tensor:
    joint = torch.eye(seen[0].shape[-1])
    for attention in seen:
        mixed = 0.5 * attention.mean(dim=1) + 0.5 * torch.eye(attention.shape[-1])
        joint = mixed / mixed.sum(dim=-1, keepdim=True) @ joint
    return joint[:, row] if isinstance(row, int) else joint[:, row].mean(dim=1)


def relevance(seen: list[Tensor], scores: Tensor, row: int | slice) -> Tensor:
    gradients = torch.autograd.grad(scores.sum(), seen)
    joint = torch.eye(seen[0].shape[-1]).expand(len(scores), -1, -1)
    for attention, gradient in zip(seen, gradients, strict=True):
        joint = joint + (attention * gradient).clamp(min=0).mean(dim=1) @ joint
    return joint[:, row] if isinstance(row, int) else joint[:, row].mean(dim=1)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_both_follow_the_published_rules(pool: str) -> None:
    model, (images, _, _) = tiny_vit(depth=3, global_pool=pool, class_token=pool == "token").eval(), batch()
    prefix, row = (1, 0) if pool == "token" else (0, slice(None))
    with probabilities(model) as seen:
        logits = model(images)
    for source, expected in (
        ("attention_rollout", rolled_out(seen, row)),
        ("transformer_relevance", relevance(seen, logits[:, 2], row)),
    ):
        found = ag.explain(model, images, source, [2], size=None)
        torch.testing.assert_close(found.maps.flatten(2)[:, 0], expected[:, prefix:].detach())


def test_several_classes_are_one_and_one() -> None:
    model, (images, labels, _) = tiny_vit().eval(), batch()
    every = ag.explain(model, images, "transformer_relevance", "all", size=None).maps
    for cls in range(4):
        alone = ag.explain(model, images, "transformer_relevance", [cls], size=None).maps
        torch.testing.assert_close(every[:, cls], alone[:, 0])
    few = ag.explain(model, images, "transformer_relevance", [(0, 1), (2, 3), (2, 0)], size=None)
    torch.testing.assert_close(few.maps[2, 0], every[2, 3])
    assert not bool(few.maps[1].any())
    assert len(labels) == 4


@pytest.mark.parametrize(
    ("build", "size", "blocks"),
    [
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64), 64, 12),
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, num_classes=9), 56, 12),
        (lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48), 32, 2),
        (lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=5), 32, 3),
    ],
    ids=["distilled", "rotary", "relative positions", "torchvision"],
)
def test_what_is_read_is_what_the_model_does(build: object, size: int, blocks: int) -> None:
    torch.manual_seed(0)
    model = build().eval()  # type: ignore[operator]
    if isinstance(model, torchvision.models.VisionTransformer):
        nn.init.normal_(model.heads.head.weight)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
    for source in ("attention_rollout", "transformer_relevance"):
        found = ag.explain(model, images, source)
        torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
        assert bool(found.maps.isfinite().all())
        assert float(found.maps.amax()) > 0
    (layer,) = ag.layers.find_layers(model, images)
    assert len(find_attention(model, images, layer.tokens).modules) == blocks


@pytest.mark.parametrize("settings", [{}, {"need_weights": True}, {"average_attn_weights": False}])
def test_multi_head_attention_is_what_pytorch_computes(settings: dict[str, bool]) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    values, seen = torch.rand(2, 5, 12), []
    expected = attention(values, values, values, **settings)
    with Reading(lambda probabilities: seen.append(probabilities) or probabilities):
        found = attention(values, values, values, **settings)
    torch.testing.assert_close(found, expected)
    assert seen[0].shape == (2, 3, 5, 5)
    masked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with Reading(lambda probabilities: probabilities), pytest.raises(LayerError, match="has masks"):
        attention(values, values, values, attn_mask=masked)


@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_attention_step_by_step_is_the_fused_one(masked: str | None) -> None:
    query, key, value = torch.rand(3, 2, 4, 6, 8)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    options: dict[str, Any] = {
        None: {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(6, 6), "scale": 0.3},
        "causal": {"is_causal": True},
    }[masked]
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with Reading(lambda probabilities: probabilities):
        found = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


def test_relevance_guides_and_leaves_nothing() -> None:
    model, (images, labels, masks) = tiny_vit(), batch()
    before = snapshot(model)
    with ag.Guide(model, source="transformer_relevance", loss="energy") as guide:
        report = guide.check(images, labels, mask=masks)
        assert report.unreached == []
    assert snapshot(model) == before


def test_relevance_agrees_with_finite_differences() -> None:
    torch.manual_seed(2)
    model = tiny_vit().double()
    images, labels, masks = batch(3)
    with ag.Guide(model, source="transformer_relevance", loss="cosine") as guide:

        def compute() -> Tensor:
            model(images.double())
            return guide.loss(labels, mask=masks.double())

        weight = model.blocks[0].attn.qkv.weight
        (gradient,) = torch.autograd.grad(compute(), [weight])
        direction = torch.randn(weight.shape, dtype=torch.float64)
        values = []
        for step in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                weight += step * direction
            values.append(float(compute().detach()))
    expected = (values[0] - values[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_training_goes_on_as_it_did_with_fused_attention() -> None:
    model, (images, labels, _) = tiny_vit(), batch()
    plain = torch.autograd.grad(model(images).log_softmax(1)[:, 0].sum(), list(model.parameters()))
    with ag.Guide(model, source="attention_rollout", weight=0.0) as guide:
        loss = model(images).log_softmax(1)[:, 0].sum()
        guided = torch.autograd.grad(
            loss + guide.loss(labels, mask=torch.ones(32, 32)), list(model.parameters())
        )
    for one, other in zip(plain, guided, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("source", ["attention_rollout", "transformer_relevance"])
def test_a_network_without_attention_is_refused(source: str) -> None:
    images = batch()[0]
    with pytest.raises(LayerError, match="need a transformer"):
        ag.explain(cnn(), images, source)
    model = cnn()
    before = snapshot(model)
    with ag.Guide(model, source=source), pytest.raises(LayerError, match="need a transformer"):
        model(images)
    assert snapshot(model) == before


def test_several_read_one_model() -> None:
    model, (images, labels, masks) = tiny_vit(), batch()
    model.eval()
    alone = ag.explain(model, images, "transformer_relevance")
    with ag.Guide(model, source="transformer_relevance", loss="cosine") as first:
        model(images)
        expected = first.loss(labels, mask=masks)
        gradient = torch.autograd.grad(expected, model.blocks[0].attn.qkv.weight)[0]
        with ag.Guide(model, source="attention_rollout", loss="cosine") as second:
            model(images)
            loss = first.loss(labels, mask=masks)
            again = torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight, retain_graph=True)[0]
            torch.testing.assert_close(again, gradient)
            assert second.loss(labels, mask=masks).requires_grad
            torch.testing.assert_close(ag.explain(model, images, "transformer_relevance").maps, alone.maps)
        report = first.audit(images, labels, mask=masks, tolerance=1.0)
        assert report.optimized > 0


@pytest.mark.parametrize("source", ["attention_rollout", "transformer_relevance"])
def test_activation_checkpointing_is_refused(source: str) -> None:
    model, images = tiny_vit(), batch()[0]
    model.set_grad_checkpointing(True)
    with pytest.raises(LayerError, match=r"set_grad_checkpointing\(False\)"):
        ag.explain(model, images, source)
    with ag.Guide(model, source=source), pytest.raises(LayerError, match="checkpoints activations"):
        model(images)


def test_half_precision_does_not_overflow() -> None:
    query = torch.full((1, 1, 4, 64), 40.0).half()
    key = query.clone()
    key[:, :, 1] = 0
    with Reading(lambda probabilities: probabilities):
        found = F.scaled_dot_product_attention(query, key, torch.rand(1, 1, 4, 64).half())
    assert bool(found.isfinite().all())


def test_what_was_found_follows_the_model_and_the_size() -> None:
    model, images = tiny_vit(dynamic_img_size=True).eval(), torch.rand(2, 3, 32, 32)
    assert find_attention(model, images, 17).readers == (0,)
    assert len(find_attention(model, torch.rand(1, 3, 48, 48), 37).modules) == 2
    model.global_pool = "avg"
    assert find_attention(model, images, 17).readers == tuple(range(1, 17))
    with pytest.raises(LayerError, match="among all of its 12 tokens"):
        find_attention(model, images, 12)


def test_a_module_that_attends_twice_is_refused() -> None:
    model = tiny_vit().eval()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(LayerError, match="attends several times"):
        ag.explain(model, torch.rand(2, 3, 32, 32), "attention_rollout", layer="norm")
