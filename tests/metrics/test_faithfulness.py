"""Deletion and insertion on a model whose answer is known."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide import metrics
from attnguide.errors import InputError
from attnguide.metrics.faithfulness import area
from attnguide.testing import snapshot


class Corner(nn.Module):
    """Probability of class 1: how much of the upper left quarter is bright."""

    def forward(self, images: Tensor) -> Tensor:
        share = images[:, 0, :4, :4].mean(dim=(1, 2)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([torch.zeros_like(share), torch.logit(share)], dim=1)


IMAGES, CLASSES = torch.ones(2, 1, 8, 8), torch.tensor([1, 1])


def maps() -> Tensor:
    """The corner first, and the corner last."""
    found = torch.zeros(2, 8, 8)
    found[0, :4, :4] = found[1, :4, :4] = 1
    found[1] = 1 - found[1]
    return found


def test_curves_by_hand() -> None:
    # Four steps of sixteen pixels, of which the first, or the last, takes the corner away.
    curves = metrics.deletion(Corner(), IMAGES, maps(), CLASSES, steps=4, baseline="zero")
    expected = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    torch.testing.assert_close(curves, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(area(curves), torch.tensor([0.125, 0.875]), atol=1e-5, rtol=0)
    curves = metrics.insertion(Corner(), IMAGES, maps(), CLASSES, steps=4, baseline="zero", batch_size=3)
    torch.testing.assert_close(curves, 1 - expected, atol=1e-5, rtol=0)
    for metric, value in ((metrics.Deletion, 0.5), (metrics.Insertion, 0.5)):
        mean = metric(Corner(), steps=4, baseline="zero")
        mean.update(IMAGES, maps(), CLASSES)
        assert mean.compute().item() == pytest.approx(value, abs=1e-5)
        assert list(mean.parameters()) == []


def test_with_several_labels_each_logit_is_a_yes_or_no() -> None:
    curves = metrics.deletion(Corner(), IMAGES, maps(), torch.tensor([0, 1]), steps=4, baseline="zero")
    several = metrics.deletion(
        Corner(), IMAGES, maps(), torch.tensor([0, 1]), steps=4, baseline="zero", multi_label=True
    )
    # The logit of class 0 is always 0; that of class 1 is the same probability either way.
    torch.testing.assert_close(several[0], torch.full((5,), 0.5))
    torch.testing.assert_close(several[1], curves[1], atol=1e-5, rtol=0)
    assert curves[0, 0] < 0.01


@pytest.mark.parametrize("baseline", ["mean", "blur", "zero"])
def test_the_ends_are_the_image_and_the_baseline(baseline: str) -> None:
    model, images = cnn(3).train(), torch.rand(3, 3, 32, 40)
    classes = torch.tensor([0, 2, 1])
    before = snapshot(model)
    options = {"steps": 7, "baseline": baseline}
    away = metrics.deletion(model, images, torch.ones(3, 32, 40), classes, **options)  # type: ignore[arg-type]
    back = metrics.insertion(model, images, torch.ones(3, 32, 40), classes, **options)  # type: ignore[arg-type]
    assert snapshot(model) == before
    torch.testing.assert_close(away[:, 0], back[:, -1])
    torch.testing.assert_close(away[:, -1], back[:, 0])
    whole = model.eval()(images).softmax(dim=1).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(away[:, 0], whole)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="need maps"):
        metrics.deletion(Corner(), IMAGES, maps()[:1], CLASSES)
    with pytest.raises(InputError, match="not finite"):
        metrics.deletion(Corner(), IMAGES, maps() * torch.nan, CLASSES)
    with pytest.raises(InputError, match="steps=65"):
        metrics.insertion(Corner(), IMAGES, maps(), CLASSES, steps=65)
    with pytest.raises(InputError, match=r"baseline='blurred' is unknown.*blur"):
        metrics.insertion(Corner(), IMAGES, maps(), CLASSES, baseline="blurred")  # type: ignore[arg-type]


def test_a_guide_still_finds_the_pass_before() -> None:
    model, images, labels = cnn(3), torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    with ag.Guide(model) as guide:
        model(images)
        expected = guide.loss(labels, mask=torch.ones(32, 32).tril())
        metrics.deletion(model, images, torch.rand(2, 32, 32), labels)
        metrics.occlusion(model, images, labels)
        torch.testing.assert_close(guide.loss(labels, mask=torch.ones(32, 32).tril()), expected)


def test_a_clone_looks_at_the_same_model() -> None:
    model, images, maps_ = cnn(3), torch.rand(2, 3, 32, 32), torch.rand(2, 32, 32)
    metric = metrics.Deletion(model, steps=3)
    clone = metric.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for each in (metric, clone):
        each.update(images, maps_, torch.tensor([0, 1]))
        assert float(each.compute()) == pytest.approx(1 / 3)
