"""Measures of pytorch-grad-cam and captum on any classifier."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from tests.helpers.models import batch, cnn
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.functional import min_max
from attnguide.interfaces import AttributionSource
from attnguide.metrics import confidence_change, road, sensitivity
from attnguide.testing import snapshot

IMAGES, LABELS, _ = batch()
IMAGES = IMAGES - IMAGES.mean()
MAPS = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0))


class Corner(nn.Module):
    """Sees the brightness of the upper left corner, and nothing else."""

    def forward(self, images: Tensor) -> Tensor:
        evidence = 5 * images[:, :, :8, :8].mean(dim=(1, 2, 3))
        return torch.stack([evidence, -evidence], dim=1)


def test_road_is_that_of_pytorch_grad_cam() -> None:
    model = cnn().eval()
    before = snapshot(model)
    found = road(model, IMAGES[:2], MAPS[:2], LABELS[:2], percentiles=[30, 70])
    assert snapshot(model) == before
    targets = [ClassifierOutputSoftmaxTarget(cls) for cls in LABELS[:2].tolist()]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        expected = ROADCombined([30, 70])(IMAGES[:2], min_max(MAPS[:2]).numpy(), targets, model)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-6)


def test_road_prefers_the_map_that_shows_what_matters() -> None:
    images = torch.full((1, 3, 32, 32), -1.0)
    images[..., :8, :8] = 1.0
    honest = torch.zeros(1, 32, 32)
    honest[:, :8, :8] = 1
    honest += 0.01 * MAPS[:1]
    cls = torch.tensor([0])
    # Of a quarter of the pixels the corner is the first part, and among the last it is left alone.
    right, wrong = (road(Corner(), images, maps, cls, percentiles=[75]) for maps in (honest, 1 - honest))
    assert float(right) > float(wrong) + 0.2


def test_confidence_change_by_hand() -> None:
    model = cnn().eval()
    found = confidence_change(model, IMAGES, MAPS, LABELS)
    with torch.no_grad():
        now, before = (
            model(images).softmax(dim=1).gather(1, LABELS[:, None])[:, 0]
            for images in (IMAGES * min_max(MAPS)[:, None], IMAGES)
        )
    torch.testing.assert_close(found, now - before, rtol=1e-4, atol=1e-5)


class Fixed(AttributionSource):
    """The same map for every image."""

    needs_gradient = False

    def __call__(self, trace: Any, pairs: Any) -> Tensor:
        return torch.ones(len(pairs), *self.size(trace))


def test_sensitivity_is_none_for_a_map_that_never_changes() -> None:
    model = cnn().eval()
    assert sensitivity(model, IMAGES, LABELS, Fixed()).tolist() == [0, 0, 0, 0]
    values = sensitivity(model, IMAGES, LABELS, "input_gradient")
    assert bool((values > 0).all())
    torch.testing.assert_close(values, sensitivity(model, IMAGES, LABELS, "input_gradient"))
    assert bool((sensitivity(model, IMAGES, LABELS, "input_gradient", radius=1e-6) < values).all())


def test_what_does_not_fit_or_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="do not fit"):
        road(cnn(), IMAGES, MAPS[:, :16], LABELS)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam.utils.model_targets", None)
    with pytest.raises(InputError, match=r"pip install 'attnguide\[grad-cam\]'"):
        confidence_change(cnn(), IMAGES, MAPS, LABELS)
