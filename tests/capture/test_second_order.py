"""Activations get second derivatives, and keep their values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import CLASSES, batch
from torch import nn
from torch.backends import cuda

import attnguide as ag
from attnguide.capture.second_order import Fusion, SecondOrder, smooth
from attnguide.testing import process, snapshot


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoids_get_a_second_derivative(inplace: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1),
        nn.GELU(),
        nn.Conv2d(8, 8, 1),
        nn.Hardsigmoid(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).eval()
    images, labels, masks = batch()
    with torch.no_grad():
        plain = model(images)
    before = snapshot(model)
    with ag.Guide(model, layer="1", loss="cosine") as guide:
        torch.testing.assert_close(model(images), plain, rtol=0, atol=0)
        loss = guide.loss(labels, mask=masks)
        (gradient,) = torch.autograd.grad(loss, model[2].weight)
    assert bool(gradient.any())
    assert snapshot(model) == before
    # Finite differences, away from the kinks.
    step, weight = 1e-3, model[2].weight
    direction = gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        with ag.Guide(model, layer="1", loss="cosine") as guide:
            model(images)
            values.append(float(guide.loss(labels, mask=masks).detach()))
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_gelus_keep_their_values_and_derivatives() -> None:
    model = nn.GELU()
    hooks = smooth(model)
    values = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model(values), F.gelu(values))
    assert torch.autograd.gradcheck(model, values)
    assert torch.autograd.gradgradcheck(model, values)
    hooks[""].remove()
    assert "GeluBackward" in type(model(values).grad_fn).__name__


def test_silus_keep_their_values_and_derivatives() -> None:
    model = nn.SiLU()
    hooks = smooth(model)
    values = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model(values), F.silu(values))
    assert torch.autograd.gradcheck(model, values)
    assert torch.autograd.gradgradcheck(model, values)
    hooks[""].remove()
    assert "SiluBackward0" in type(model(values).grad_fn).__name__


def test_hard_sigmoids_keep_their_first_derivative() -> None:
    model = nn.Hardsigmoid()
    values = torch.linspace(-4.95, 4.95, 34, dtype=torch.float64, requires_grad=True)
    expected = F.hardsigmoid(values)
    (slope,) = torch.autograd.grad(expected.sum(), values)
    smooth(model)
    found = model(values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (smoothed,) = torch.autograd.grad(found.sum(), values)
    torch.testing.assert_close(smoothed, slope)
    assert torch.autograd.gradgradcheck(model, values)


def test_attention_is_fused_again_when_the_last_user_leaves() -> None:
    before = process()
    second = Fusion()
    with SecondOrder(nn.Identity()).held([Fusion()]):
        assert not cuda.flash_sdp_enabled()
        assert cuda.math_sdp_enabled()
        second.unfuse()
        second.unfuse()  # counted once
    assert not cuda.flash_sdp_enabled()  # the second still needs it so
    second.fuse()
    second.fuse()
    assert process() == before
