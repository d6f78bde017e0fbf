"""guide.check measures the guidance gradient, and nothing else changes."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
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


def test_the_report_is_a_table_in_a_notebook() -> None:
    model = cnn()
    model.block1.requires_grad_(False)
    images, labels, masks = batch()
    shown = ag.Guide(model, layer="block3").check(images, labels, mask=masks)._repr_html_()
    rows = ElementTree.fromstring(f"<div>{shown}</div>").findall(".//tbody/tr")
    states = {"".join(row[0].itertext()): "".join(row[2].itertext()) for row in rows}
    assert states["block1.0"] == "frozen"
    assert states["block4.0"] != "frozen"
    assert "guidance loss" in shown


def test_records_show_image_map_and_prior() -> None:
    model = cnn()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    assert "call guide.loss first" in guide.records()._repr_html_()
    guide.loss(labels, mask=masks)
    (record,) = records = guide.records()
    torch.testing.assert_close(record.images, images)
    with Image.open(io.BytesIO(record._repr_png_() or b"")) as page:
        assert page.size == record.picture().size
    assert records._repr_html_().count("<img") == 1
    assert record.picture(pairs=1).height < record.picture().height
    model(images)
    guide.loss(labels, mask=None)
    (nothing,) = guide.records()
    assert nothing._repr_png_() is None
    assert "no annotated pair" in guide.records()._repr_html_()
    with pytest.raises(ag.AttnGuideError, match="nothing to draw"):
        nothing.picture()
