"""The losses and scores of the training loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.models import cnn
from tests.plugins.gradcam_iou.samples import (
    SIZE,
    cnn_without_randomness,
    corner,
    quick,
    same,
    samples,
    template,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attnguide as ag
from attnguide import functional
from attnguide.errors import GuidanceError, InputError
from attnguide.priors.mask import MaskPrior
from attnguide.testing import hooks


def test_one_class_for_each_image() -> None:
    """Class indices mean a softmax: what is reported is what a plain loop computes, and −100 is unknown."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 3, SIZE, SIZE, generator=generator), torch.tensor([0, 1, 2, -100, 1, 0])
    masks = corner().expand(6, -1, -1)
    data = list(zip(images, labels, masks, strict=True))
    model = cnn_without_randomness()
    history = quick(
        model, data, batch_size=6, guidance_weight=0.5, validation=data, epochs=1, measure_before=True
    )
    assert [epoch.number for epoch in history] == [0, 1]
    plain = cnn_without_randomness().eval()
    known = labels >= 0
    with ag.Guide.from_recipe(plain, "gradcam-iou", targets="labels", evidence="logit") as guide:
        right = (plain(images).argmax(dim=1) == labels)[known].float().mean()
        guide.loss(labels, mask=masks)
        overlap = (-functional.iou_loss(guide.records()[0].maps, guide.records()[0].prior)).exp().mean()
        assert history[0].accuracy == pytest.approx(right.item())
        assert history[0].iou == pytest.approx(overlap.item(), rel=1e-4)
        plain.train()
        loss = nn.functional.cross_entropy(plain(images), labels)
        guided = guide.loss(labels, mask=masks)
    assert history[1].attribute_loss == pytest.approx(loss.item(), rel=1e-4)
    assert history[1].guidance_loss == pytest.approx(guided.item(), rel=1e-3)
    assert str(history[0]).startswith("epoch 0, accuracy")


def test_the_loss_is_the_published_one() -> None:
    """One batch, one step: what is reported is what a plain loop computes."""
    data = samples(8)
    history = quick(cnn_without_randomness(), data, template=template(), batch_size=8, guidance_weight=0.5)
    model = cnn_without_randomness().train()
    images, attributes = (torch.stack(part) for part in zip(*data, strict=True))
    with ag.Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(template()), weight=0.5) as guide:
        attribute = nn.functional.binary_cross_entropy_with_logits(model(images), attributes)
        guided = guide.loss(attributes)
    assert history[0].attribute_loss == pytest.approx(attribute.item(), rel=1e-4)
    assert 0.5 * history[0].guidance_loss == pytest.approx(guided.item(), rel=1e-3)


def test_weights_of_the_losses() -> None:
    def trained(**options: float) -> list[Tensor]:
        model = cnn_without_randomness()
        quick(model, samples(8), template=template(), batch_size=8, **options)
        return weights(model)

    both = trained()
    assert not same(both, trained(guidance_weight=0))
    assert not same(both, trained(attribute_weight=0))
    untouched = cnn_without_randomness()
    quick(untouched, samples(8), template=template(), batch_size=8, guidance_weight=0, attribute_weight=0)
    parameters = zip(untouched.parameters(), cnn_without_randomness().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


@pytest.mark.parametrize("missing", [torch.nan, -100.0])
def test_unknown_labels_do_not_count(missing: float) -> None:
    data = samples(8)
    unknown = [(image, attributes.clone()) for image, attributes in data]
    for _, attributes in unknown:
        attributes[0] = missing
    (epoch,) = quick(cnn(), unknown, validation=unknown, template=template(), batch_size=4)
    assert np.isfinite([epoch.attribute_loss, epoch.guidance_loss, epoch.accuracy, epoch.iou]).all()


def test_masks_of_single_images_some_without() -> None:
    data = samples(12, masks=True)
    absent = torch.full((SIZE, SIZE), torch.nan)
    data = [(*sample[:2], sample[2] if index == 7 else absent) for index, sample in enumerate(data)]
    (epoch,) = quick(cnn(), data, validation=data, batch_size=4)
    assert np.isfinite([epoch.guidance_loss, epoch.iou]).all()
    (epoch,) = quick(cnn(), data, validation=samples(4), batch_size=4)
    assert epoch.iou is None
    assert epoch.accuracy is not None


def test_loss_that_is_not_finite_names_the_step() -> None:
    data = samples(12)
    data[9][0][:] = torch.nan
    model = cnn()
    with pytest.raises(GuidanceError, match=r"epoch 1, step \d.*learning_rate"):
        quick(model, DataLoader(data, 4), template=template())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert hooks(model) == {}


def test_useless_guidance_fails_before_the_first_step() -> None:
    model = cnn()
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    before = weights(model)
    with pytest.raises(GuidanceError, match="arrives at no weight"):
        quick(model, samples(8), template=template(), batch_size=4)
    assert same(before, weights(model))
    assert hooks(model) == {}


def test_masks_that_are_all_missing() -> None:
    absent = torch.full((SIZE, SIZE), torch.nan)
    data = [(*sample, absent) for sample in samples(4)]
    with pytest.raises(InputError, match="no sample of the training data has a mask"):
        quick(cnn(), data, batch_size=2)
