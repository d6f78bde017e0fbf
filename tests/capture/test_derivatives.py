"""Second derivatives that are written out equal PyTorch's own, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import CLASSES, batch
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnguide as ag
from attnguide.capture.derivatives import Derivatives

DOUBLE = {"dtype": torch.float64}


def names_in(output: Tensor) -> set[str]:
    """Names of the nodes in a tensor's graph."""
    found, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare first and second derivatives with finite differences, and see that ours were taken."""
    kept = []

    def exchanged(*given: Tensor) -> Tensor:
        output = function(*given)
        kept.append(Derivatives(output, given))
        return output

    given = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(exchanged, given)
    assert torch.autograd.gradgradcheck(exchanged, given)
    (gradient,) = torch.autograd.grad(exchanged(*given).sin().sum(), given[0], create_graph=True)
    own = {
        f"_{name}Backward"
        for name in (
            "InputSide", "NormGradient", "LayerNormGradient", "Activation", "ScaledGradient", "MeanGradient"
        )
    }  # fmt: skip
    assert own & names_in(gradient)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 1, 1, 4), (2, 1, 1, 4), (1, 2, 2, 2), ((2, 1), (0, 1), 1, 1), (3, 0, 1, 4), (1, "same", (1, 2), 4)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(stride: Any, padding: Any, dilation: Any, groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 6, 7, **DOUBLE)
    weights = [torch.randn(8, 4 // groups, 3, 3, **DOUBLE), torch.randn(8, **DOUBLE)][: 1 + bias]

    def convolve(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)

    check(convolve, images, *weights)


def test_convolutions_with_padding_that_depends_on_the_size_and_in_one_dimension() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 1, 3, 3, **DOUBLE)
    check(
        lambda images, weight: F.conv2d(pad_same(images, [3, 3], [2, 2]), weight, None, 2, 0, 1, 4),
        torch.randn(2, 4, 6, 7, **DOUBLE),
        weight,
    )
    check(
        lambda series, weight: F.conv1d(series, weight, None, 1, 1, 1, 4),
        torch.randn(2, 4, 6, **DOUBLE),
        weight[..., 0],
    )


@pytest.mark.parametrize("affine", [False, True])
def test_normalization_in_training(affine: bool) -> None:
    torch.manual_seed(0)
    slopes = torch.randn(3, 2, 3, 4, **DOUBLE)
    weights = torch.randn(2, 2, **DOUBLE).unbind() if affine else ()
    check(
        lambda images, weight=None, bias=None: (
            slopes * F.batch_norm(images, None, None, weight, bias, True, eps=0.1)
        ),
        torch.randn(3, 2, 3, 4, **DOUBLE),
        *weights,
    )
    weights = torch.randn(2, 4, **DOUBLE).unbind() if affine else ()
    check(
        lambda images, weight=None, bias=None: slopes * F.layer_norm(images, (4,), weight, bias, eps=0.1),
        torch.randn(3, 2, 3, 4, **DOUBLE),
        *weights,
    )


def test_factors_of_channels_and_means() -> None:
    torch.manual_seed(0)
    features, slopes = torch.randn(2, 2, 3, 4, 5, **DOUBLE)
    check(lambda features: slopes * (features * features[:, :, :1, :1]), features)
    check(lambda features: slopes * (features[:, :, :1, :1] * features), features)
    check(lambda features: (features * features.mean((2, 3), keepdim=True)).square(), features)
    check(lambda features: features.mean((-1, 1)).square(), features)


@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.hardswish, F.silu, F.gelu])
def test_activations(activation: Callable[[Tensor], Tensor]) -> None:
    values = torch.linspace(-4.95, 6.95, 35, **DOUBLE)  # no kink among them
    check(lambda values: activation(values) * values, values)


class Depthwise(nn.Module):
    """A small network of what MobileNets and EfficientNets are made of."""

    def __init__(self, activation: type[nn.Module], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8))
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            activation(inplace=True),
            nn.Conv2d(8, 16, 1),
            activation(),
            nn.Conv2d(16, 16, 3, 2, 2, dilation=2, groups=4),
            nn.BatchNorm2d(16),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.head = nn.Linear(16, CLASSES)
        self.checkpointed = checkpointed

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = checkpoint(self.body, features, use_reentrant=False) if self.checkpointed else (
            self.body(features)
        )  # fmt: skip
        pooled: Tensor = self.head((features * self.gate(features)).mean((2, 3)))
        return pooled


def guided_gradients(
    model: nn.Module, layer: str, monkeypatch: pytest.MonkeyPatch, *, exchanged: bool, images: Tensor
) -> list[Tensor]:
    """Gradients of the guidance term alone, with PyTorch's own derivatives or with the exchanged ones."""
    _, labels, masks = batch()
    source = "input_gradient" if layer == "input" else "grad_cam"
    with monkeypatch.context() as patch:
        if not exchanged:
            patch.setattr("attnguide.capture.derivatives._TWINS", {})
        with ag.Guide(model, layer=layer, source=source, loss="cosine") as guide:
            model(images)
            loss = guide.loss(labels, mask=masks)
            weights = [weight for name, weight in model.named_parameters() if name != "head.bias"]
            return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.SiLU])
@pytest.mark.parametrize("layer", ["stem", "input"])
@pytest.mark.parametrize("setting", ["plain", "channels last", "evaluation", "checkpointed", "hooked"])
def test_the_guided_gradients_of_a_depthwise_network_stay(
    activation: type[nn.Module], layer: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Depthwise(activation, checkpointed=setting == "checkpointed").double()
    images = batch()[0].double()
    seen: list[Tensor] = []
    if setting == "channels last":
        model, images = model.to(memory_format=torch.channels_last), images.contiguous(
            memory_format=torch.channels_last
        )  # fmt: skip
    if setting == "evaluation":
        model.eval()
    if setting == "hooked":
        guided_gradients(model, layer, monkeypatch, exchanged=True, images=images)  # the layer is measured
        model.body[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    before, after = (
        guided_gradients(model, layer, monkeypatch, exchanged=exchanged, images=images)
        for exchanged in (False, True)
    )
    assert any(bool(gradient.any()) for gradient in before)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-12)
    half = len(seen) // 2
    torch.testing.assert_close(seen[half:], seen[:half], rtol=1e-6, atol=1e-12)


def test_the_guided_gradients_stay_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Depthwise(nn.SiLU)
    images = batch()[0]
    exact = guided_gradients(model, "stem", monkeypatch, exchanged=True, images=images)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (
            guided_gradients(model, "stem", monkeypatch, exchanged=exchanged, images=images)
            for exchanged in (False, True)
        )

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return float(sum((one - other).norm() for one, other in pairs) / sum(x.norm() for x in exact))

    assert error(after) < max(0.05, 1.2 * error(before))


def test_batched_gradients_keep_pytorchs_own() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 5, 5, **DOUBLE).requires_grad_()
    weight = torch.randn(3, 1, 3, 3, **DOUBLE)
    rows = torch.eye(2, **DOUBLE)
    found = []
    for exchanged in (False, True):
        output = F.silu(F.conv2d(values, weight, groups=3)).sum((2, 3))[0, :2]
        kept = Derivatives(output, [values]) if exchanged else None
        (gradient,) = torch.autograd.grad(output, values, rows, create_graph=True, is_grads_batched=True)
        found.append(torch.autograd.grad(gradient.square().sum(), values)[0])
        del kept
    torch.testing.assert_close(found[1], found[0])


def test_nothing_is_exchanged_when_the_pass_is_forgotten() -> None:
    values = torch.randn(4, **DOUBLE).requires_grad_()
    output = F.silu(values)
    derivatives = Derivatives(output, [values])
    assert len(derivatives.nodes) == 1
    assert Derivatives(output, [values]).nodes == []  # once is enough
    del derivatives
    (gradient,) = torch.autograd.grad(output.sum(), values, create_graph=True)
    assert "_ActivationBackward" not in names_in(gradient)


def test_what_comes_before_the_layer_is_left_alone() -> None:
    values = torch.randn(4, **DOUBLE).requires_grad_()
    feature = F.silu(values)
    assert len(Derivatives(F.silu(F.gelu(feature)), [feature]).nodes) == 2
