"""Mixup and CutMix with masks: each class of a mixed image has the mask and the share of its own image."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.models import batch, cnn
from timm.data import Mixup
from torch import Tensor
from torchvision.transforms import v2

import attnguide as ag
from attnguide.data import mix
from attnguide.errors import InputError

CLASSES = 4
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    np.random.set_state(state)


def timm(**options: Any) -> Mixup:
    return Mixup(label_smoothing=0.0, num_classes=CLASSES, **options)


MIXERS: dict[str, Mixer] = {
    "mixup": timm(mixup_alpha=0.8),
    "mixup, elements": timm(mixup_alpha=0.8, mode="elem", prob=0.7),
    "cutmix": timm(mixup_alpha=0.0, cutmix_alpha=1.0),
    "cutmix, elements": timm(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem"),
    "both, pairs": timm(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair"),
    "v2.MixUp": v2.MixUp(num_classes=CLASSES),
    "v2.CutMix": v2.CutMix(num_classes=CLASSES),
    "v2.RandomChoice": v2.RandomChoice([v2.CutMix(num_classes=CLASSES), v2.MixUp(num_classes=CLASSES)]),
    "none": timm(mixup_alpha=0.8, prob=0.0),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("size", [2, 8])
def test_shares_and_masks_are_those_of_the_mixer(name: str, size: int) -> None:
    images, labels, masks = batch(size)
    labels = torch.arange(size) % 2 + 2 * (torch.arange(size) // 2 % 2)
    # Two more channels show what becomes of each image.
    numbers = torch.arange(1.0, size + 1)[:, None, None, None].expand(-1, 1, 32, 32)
    images = torch.cat([images, numbers, numbers.square()], dim=1)
    for _ in range(10):
        mixed = mix(MIXERS[name], images, labels, masks)
        labels_of, weight = mixed.guidance["labels"], mixed.guidance["sample_weight"]
        torch.testing.assert_close(weight, mixed.labels.float(), rtol=0, atol=2e-5)
        assert torch.equal(labels_of, weight > 0)
        first, second = mixed.images[:, 3], mixed.images[:, 4]
        for sample in range(size):
            # Where two images a and b make up a pixel, its shares follow from their numbers and squares.
            plain = (first[sample].square() - second[sample]).abs() < 1e-4
            for cls, mask in (mixed.guidance["mask"][sample] or {}).items():
                expected = torch.zeros(32, 32)
                for number in range(size):
                    if labels[number] == cls and mixed.labels[sample, cls] > 0:
                        there = plain & ((first[sample] - (number + 1)).abs() < 1e-4)
                        expected = torch.maximum(expected, torch.where(there, masks[number], 0.0))
                if bool(plain.all()):
                    assert torch.equal(mask, expected), (name, sample, cls)
                else:  # mixup: the masks of both images, whole
                    own = [masks[n] for n in range(size) if labels[n] == cls]
                    assert bool(mask.any())
                    assert bool((mask <= torch.stack(own).amax(dim=0)).all())


def swapped(share: float | Tensor) -> Mixer:
    """A mixer that mixes the first with the second image, and the third with the fourth."""

    def mixer(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hot = torch.nn.functional.one_hot(labels, CLASSES).float()
        order = [1, 0, 3, 2]
        whole = float(torch.as_tensor(share).mean())
        return images * share + images[order] * (1 - share), hot * whole + hot[order] * (1 - whole)

    return mixer


def test_the_loss_is_the_weighted_mean_of_both_images() -> None:
    images, labels, masks = batch()
    model = cnn().eval()
    mixed = mix(swapped(0.7), images, labels, masks)
    torch.testing.assert_close(mixed.images, images * 0.7 + images[[1, 0, 3, 2]] * 0.3)
    with ag.Guide(model) as guide:
        model(mixed.images)
        loss = guide.loss(**mixed.guidance)
        own = guide.loss(labels, mask=masks)
        other = guide.loss(labels[[1, 0, 3, 2]], mask=masks[[1, 0, 3, 2]])
    torch.testing.assert_close(loss, 0.7 * own + 0.3 * other, rtol=1e-5, atol=1e-6)


def test_a_cut_mask() -> None:
    images, labels, _ = batch()
    share = torch.ones(32, 32)
    share[:, 16:] = 0  # the right half is the other image's
    left, right = torch.zeros(32, 32), torch.zeros(32, 32)
    left[:4, :20] = 1
    right[8:, 24:] = 1
    mixed = mix(swapped(share), images, labels, [left, right, left[None], None])
    first, second, third, fourth = mixed.guidance["mask"]
    assert torch.equal(first[0], left * share)
    assert torch.equal(first[1], right)
    # The region of class 1 was cut away, and of class 0 little is left.
    assert list(second) == [0]
    assert torch.equal(second[0], left * (1 - share))
    assert list(third) == [2]
    assert torch.equal(fourth[2], left * (1 - share))
    assert mixed.guidance["sample_weight"][0].tolist() == [0.5, 0.5, 0, 0]


def test_images_of_one_class() -> None:
    images, _, masks = batch()
    labels = torch.tensor([1, 1, 2, 2])
    masks[3] = torch.nan
    mixed = mix(swapped(0.25), images, labels, masks[:, None])
    assert torch.equal(mixed.guidance["mask"][0][1], torch.maximum(masks[0], masks[1]))
    assert mixed.guidance["mask"][2:] == [None, None]  # one of two is missing
    torch.testing.assert_close(mixed.guidance["sample_weight"], mixed.labels)


def test_half_precision_and_no_masks() -> None:
    images, labels, _ = batch()
    mixed = mix(swapped(0.999), images.half(), labels, None)
    assert mixed.images.dtype == torch.float16
    assert mixed.guidance["mask"] == [None] * 4
    torch.testing.assert_close(mixed.guidance["sample_weight"], mixed.labels, rtol=0, atol=1e-6)


def test_what_cannot_be_mixed() -> None:
    images, labels, masks = batch()

    def moved(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images * 2, torch.nn.functional.one_hot(labels, CLASSES)

    def three(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images + images.roll(1, 0) + images.roll(2, 0)) / 3, torch.zeros(4, CLASSES)

    plain = swapped(0.5)
    for mixer, arguments, message in [
        (moved, (images, labels, masks), "does more than to mix"),
        (three, (images, labels, masks), "does more than to mix"),
        (lambda images, labels: (images[:2], labels), (images, labels, masks), "the mixer made"),
        (plain, (images, labels, masks[:3]), "3 masks for 4 images"),
        (plain, (images, labels, masks[:, ::2]), r"mask 0 has shape \(16, 32\), the images are 32×32"),
        (plain, (images, labels - 1, masks), "must be class indices"),
        (plain, (images, torch.rand(4, CLASSES), masks), "must be class indices"),
        (plain, (images[0], labels, masks), "images to mix must be floats"),
        (plain, ((images * 255).byte(), labels, masks), "images to mix must be floats"),
    ]:
        with pytest.raises(InputError, match=message):
            mix(mixer, *arguments)


def test_a_guide_refuses_what_a_mixer_makes_of_labels() -> None:
    images, labels, masks = batch()
    model = cnn().eval()
    with ag.Guide(model) as guide:
        mixed, soft = v2.MixUp(num_classes=CLASSES)(images, labels)
        model(mixed)
        with pytest.raises(InputError, match=r"neither 0 nor 1.*attnguide\.data\.mix"):
            guide.loss(soft, mask=masks)
        smoothed = torch.nn.functional.one_hot(labels, CLASSES) * 0.9 + 0.025
        with pytest.raises(InputError, match=r"after label smoothing give labels > 0\.5"):
            guide.loss(smoothed, mask=masks)
        loss = guide.loss(smoothed > 0.5, mask=masks)
        torch.testing.assert_close(loss, guide.loss(labels, mask=masks))
        assert math.isfinite(float(loss.detach()))
