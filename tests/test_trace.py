"""The gradients of the guidance loss are right, down to the parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.helpers.models import batch, smooth_cnn, tiny_vit
from tests.helpers.parts import standard
from torch import nn

import attnguide as ag
from attnguide.interfaces import AlignmentLoss
from attnguide.pairs import Pairs
from attnguide.parts.registry import registry
from attnguide.trace import Trace

LOSSES = standard("loss")


def made(name: str) -> AlignmentLoss:
    return registry().create("loss", name, AlignmentLoss)


def compared(name: str, maps: torch.Tensor, prior: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Compare maps in a pass with an image for each, of the same batch and model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = smooth_cnn().to(maps.dtype)
    images, labels = (values[first : first + len(maps)] for values in batch(8)[:2])
    images = images.to(maps.dtype)
    trace = Trace(images, model(images), {}, model=model)
    return made(name).compare(maps, prior, trace, Pairs.one_each(labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("low", [-1.0, 0.1, -2.0], ids=["signed", "positive", "negative"])
def test_every_loss_passes_gradcheck(name: str, low: float) -> None:
    # Positive, mixed and all-negative maps; no two values alike, so that no maximum has a rival.
    attribution = (torch.rand(3, 4, 5, dtype=torch.float64) + low).requires_grad_()
    prior = torch.rand(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda maps: compared(name, maps, prior), attribution, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_every_loss_ignores_the_scale_and_the_other_maps(name: str, factor: float) -> None:
    attribution, prior = torch.randn(5, 6, 6), torch.rand(5, 6, 6)
    losses = compared(name, attribution, prior)
    assert losses.shape == (5,)
    torch.testing.assert_close(compared(name, attribution * factor, prior), losses, rtol=1e-4, atol=1e-5)
    one_by_one = [compared(name, attribution[n : n + 1], prior[n : n + 1], n) for n in range(5)]
    torch.testing.assert_close(torch.cat(one_by_one), losses)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["zero", "constant", "negative constant", "tiny", "huge"])
def test_every_loss_stays_finite_with_degenerate_maps(name: str, kind: str) -> None:
    maps = {
        "zero": torch.zeros(2, 4, 4),
        "constant": torch.ones(2, 4, 4),
        "negative constant": -torch.ones(2, 4, 4),
        "tiny": torch.rand(2, 4, 4) * 1e-30,
        "huge": torch.rand(2, 4, 4) * 1e30,
    }[kind].requires_grad_()
    losses = compared(name, maps, torch.rand(2, 4, 4))
    assert bool(losses.isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), maps)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", [name for name in LOSSES if made(name).reads_prior])
def test_every_loss_prefers_the_prior_to_its_complement(name: str) -> None:
    prior = torch.zeros(1, 8, 8)
    prior[:, 2:5, 2:6] = 1
    assert made(name)(prior, prior) < made(name)(1 - prior, prior)


def guided(model: nn.Module, source: str, loss: str, layer: str) -> Callable[[], torch.Tensor]:
    images, labels, masks = batch(3, 32)
    images, masks = images.double(), masks.double() * 0.9 + 0.05
    guide = ag.Guide(model, source=source, loss=loss, layer=layer, weight=0.7)

    def compute() -> torch.Tensor:
        model(images)
        return guide.loss(labels, mask=masks)

    return compute


@pytest.mark.parametrize(
    ("build", "layer"),
    [(smooth_cnn, "2"), (smooth_cnn, "5"), (tiny_vit, "blocks.1.norm1"), (tiny_vit, "blocks.0")],
    ids=["cnn early", "cnn last", "vit last", "vit early"],
)
@pytest.mark.parametrize("source", ["grad_cam", "hires_cam"])
def test_the_whole_guide_agrees_with_finite_differences(
    build: Callable[[], nn.Module], layer: str, source: str
) -> None:
    torch.manual_seed(3)
    model = build().double()
    compute = guided(model, source, "cosine", layer)
    value = compute()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    scale = max(float(g.abs().max()) for g in gradients if g is not None)
    assert scale > 0
    generator = torch.Generator().manual_seed(4)
    step = 1e-5
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        # One random direction for each parameter: it tests all of its entries at once.
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(float(compute().detach()))
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        found = 0.0 if gradient is None else float((gradient * direction).sum())
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6 * scale), name


def test_gradients_of_a_single_entry_agree_too() -> None:
    model = smooth_cnn().double()
    compute = guided(model, "grad_cam", "mse", "5")
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(compute(), [weight])
    for index in [(0, 0, 0, 0), (3, 1, 2, 1), (5, 2, 1, 2)]:
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                weight[index] += step
            values.append(float(compute().detach()))
        expected = (values[0] - values[1]) / 2e-6
        assert float(gradient[index]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_graph_reaches_the_layers_before_and_after() -> None:
    model = smooth_cnn()
    images, labels, masks = batch(3)
    guide = ag.Guide(model, layer="2")
    model(images)
    guide.loss(labels, mask=masks).backward()
    # Before the layer through the features, after it through their gradient: a second derivative.
    assert float(model[0].weight.grad.abs().sum()) > 0
    assert float(model[8].weight.grad.abs().sum()) > 0


DIFFERENTIABLE = [
    name
    for name in standard("source")
    if registry().create("source", name, ag.AttributionSource).differentiable
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_source_that_guides_reaches_what_it_depends_on(name: str) -> None:
    source = registry().create("source", name, ag.AttributionSource)
    images, labels, masks = batch(3)
    # Scores of a curved head: the gradients depend on all weights.
    model = tiny_vit() if source.reads_attention else smooth_cnn()
    layer = "2" if source.layer in ("auto", "uncentred") and not source.reads_attention else "auto"
    guide = ag.Guide(model, source=source, loss="cosine", layer=layer)
    model(images)
    guide.loss(labels, mask=masks).backward()
    reached = {
        parameter
        for parameter, value in model.named_parameters()
        if value.grad is not None and value.grad.any()
    }
    if name == "attention_rollout":
        # Queries and keys of every block; what comes after the last of them is not looked at.
        assert {f"blocks.{n}.attn.qkv.weight" for n in range(2)} <= reached
        assert not reached & {"blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.weight", "head.weight"}
    elif name == "transformer_relevance":
        assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= reached
    elif name == "layer_attention":
        assert reached == {"0.weight", "0.bias", "2.weight", "2.bias"}
    else:  # before the layer, where there is anything, and after it
        assert {"0.weight", "2.weight", "4.weight", "8.weight", "10.weight"} <= reached
