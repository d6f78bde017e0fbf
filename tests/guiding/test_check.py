"""guide.check measures the guidance gradient, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import batch, cnn

import attnguide as ag
from attnguide.testing import snapshot


def test_norms_are_those_of_autograd() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model, weight=0.3)
    report = guide.check(images, labels, mask=masks)
    model(images)
    loss = guide.loss(labels, mask=masks)
    loss.backward()
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert report.layers == ["block4"]
    modules = dict(model.named_modules())
    for group in report.groups:
        gradients = [p.grad for p in modules[group.name].parameters(recurse=False) if p.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert group.norm == pytest.approx(float(norm), rel=1e-4)
        assert group.parameters == sum(p.numel() for p in modules[group.name].parameters(recurse=False))
    assert report.reached == [group.name for group in report.groups]
    assert report.unreached == []


def test_the_report_tells_frozen_from_unreached() -> None:
    model = cnn()
    model.block1.requires_grad_(False)
    report = ag.Guide(model, layer="block3").check(*batch()[:2], mask=batch()[2])
    groups = {group.name: group for group in report.groups}
    assert not groups["block1.0"].trainable
    assert groups["block3.0"].reached
    text = str(report)
    assert "frozen" in text
    assert "at block3" in text
    assert "head" in text


def test_nothing_changes() -> None:
    model = cnn()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model.block2.eval()
    guide.check(images, labels, mask=masks)  # hooks at the layer that it found stay
    before = snapshot(model)
    with torch.no_grad():
        guide.check(images, labels, mask=masks)
    guide.check(images, labels, mask=masks)
    with pytest.raises(ag.AttnGuideError):
        guide.check(images, labels + 2, mask=masks)
    assert snapshot(model) == before
    assert guide.records() == []
