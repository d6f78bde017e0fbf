"""Occlusion maps against captum."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import cnn

from attnguide import metrics
from attnguide.errors import InputError


def test_occlusion_agrees_with_captum() -> None:
    from captum.attr import Occlusion

    torch.manual_seed(0)
    model = cnn(classes=3).eval()
    images, classes = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    ours = metrics.occlusion(model, images, classes, window=8, stride=8)
    filled = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    theirs = Occlusion(model).attribute(
        images, target=classes, sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8), baselines=filled
    )
    torch.testing.assert_close(ours, theirs[:, 0].to(ours), atol=1e-5, rtol=1e-4)


def test_occlusion_reaches_every_pixel_and_changes_nothing() -> None:
    model = cnn(classes=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = metrics.occlusion(
        model, torch.rand(3, 3, 33, 45), torch.tensor([0, 1, 0]), window=16, stride=8, batch_size=7
    )
    assert maps.shape == (3, 33, 45)
    assert bool(maps.isfinite().all())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for window, stride in ((0, 1), (64, 8), (8, 9)):
        with pytest.raises(InputError, match="stride ≤ window"):
            metrics.occlusion(
                model, torch.rand(1, 3, 32, 32), torch.tensor([0]), window=window, stride=stride
            )


def test_pairs_are_their_images_and_classes_one_by_one() -> None:
    torch.manual_seed(0)
    model, images = cnn(classes=3), torch.rand(3, 3, 32, 32)
    pairs = torch.tensor([[2, 0], [0, 1], [2, 2]])
    together = metrics.occlusion(model, images, pairs, window=8, stride=4, batch_size=50)
    for (sample, cls), found in zip(pairs, together, strict=True):
        alone = metrics.occlusion(model, images[sample][None], cls[None], window=8, stride=4)
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"classes of shape \(2,\) do not fit 3 images"):
        metrics.occlusion(model, images, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="images that do not exist: the batch has 0 to 2"):
        metrics.occlusion(model, images, torch.tensor([[3, 0]]))
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=f"class {wrong} does not exist: the model has classes 0 to 2"):
            metrics.occlusion(model, images, torch.tensor([0, 1, wrong]))
        with pytest.raises(InputError, match=f"class {wrong} does not exist"):
            metrics.deletion(model, images, torch.rand(3, 32, 32), torch.tensor([0, 1, wrong]))
