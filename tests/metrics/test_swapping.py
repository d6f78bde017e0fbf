"""Accuracy with another outside, against a loop by hand, and against models whose answer is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.masks import SwapOutside
from attnguide.metrics import SwappedAccuracy, swapped_accuracy


class Corner(nn.Module):
    """Answers by the brightness of one pixel: class 1 if it is above 0."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.row, self.column = row, column

    def forward(self, images: Tensor) -> Tensor:
        value = images[:, 0, self.row, self.column]
        return torch.stack([-value, value], dim=1)


def data(count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """The label is both in the middle, inside the mask, and in the corner, outside."""
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 1, 8, 8)
    sign = (2 * labels - 1).float()
    images[:, 0, 3:5, 3:5] = sign[:, None, None]
    images[:, 0, 0, 0] = sign
    masks = torch.zeros(count, 8, 8)
    masks[:, 2:6, 2:6] = 1
    return images, labels, masks


def test_a_model_that_looks_inside_does_not_notice() -> None:
    assert bool((swapped_accuracy(Corner(4, 4), *data()) == 1).all())


def test_a_model_of_the_outside_is_right_by_chance() -> None:
    """The partner has the same label in 19 of 39 cases."""
    metric = SwappedAccuracy(Corner(0, 0), draws=50)
    metric.update(*data())
    assert float(metric.compute()) == pytest.approx(19 / 39, abs=0.05)
    with_others = swapped_accuracy(Corner(0, 0), *data(), partners="other")
    assert bool((with_others == 0).all())


def test_it_is_the_mean_over_draws_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))
    images, labels, masks = data(12)
    images = images + torch.randn_like(images)
    found = swapped_accuracy(model, images, labels, masks, generator=torch.Generator().manual_seed(7))
    assert model.training
    model.eval()
    generator = torch.Generator().manual_seed(7)
    right = [
        model(SwapOutside()(images, labels, masks, generator=generator).images).argmax(dim=1) == labels
        for _ in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(right).float().mean(dim=0))


def test_images_without_a_mask_or_a_label_do_not_count() -> None:
    images, labels, masks = data(6)
    masks[0] = torch.nan
    masks[1] = 0  # cropped away
    labels[2] = -100
    scores = swapped_accuracy(Corner(4, 4), images, labels, masks)
    assert scores.isnan().tolist() == [True, True, True, False, False, False]
    metric = SwappedAccuracy(Corner(4, 4))
    metric.update(images, labels, masks)
    assert int(metric.count) == 3


def test_known_labels_of_several_attributes_count() -> None:
    images, labels, masks = data(4)
    several = torch.stack([1 - labels, labels], dim=1).float()
    several[0, 0], several[1] = torch.nan, torch.nan
    several[2, 0] = 1 - several[2, 0]
    scores = swapped_accuracy(Corner(4, 4), images, several, masks)
    torch.testing.assert_close(scores, torch.tensor([1.0, torch.nan, 0.5, 1.0]), equal_nan=True)


def test_mean_and_standard_error_over_batches() -> None:
    metric = SwappedAccuracy(Corner(0, 0), seed=3)
    images, labels, masks = data(30)
    scores = []
    for number, part in enumerate((slice(0, 16), slice(16, 30)), start=1):
        metric.update(images[part], labels[part], masks[part])
        generator = torch.Generator().manual_seed(3 + number)
        scores.append(
            swapped_accuracy(Corner(0, 0), images[part], labels[part], masks[part], generator=generator)
        )
    every = torch.cat(scores)
    torch.testing.assert_close(metric.compute(), every.mean())
    torch.testing.assert_close(metric.standard_error, every.std() / math.sqrt(30))


def test_draws_are_the_same_again() -> None:
    metric = SwappedAccuracy(Corner(0, 0))
    found = []
    for _ in range(2):
        metric.update(*data())
        found.append(metric.compute())
        metric.reset()
    assert found[0] == found[1]


def test_it_is_empty_at_first_and_can_be_copied() -> None:
    metric = copy.deepcopy(SwappedAccuracy(Corner(0, 0)))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    assert metric.standard_error.isnan()


def test_a_single_image_has_no_partner() -> None:
    images, labels, masks = data(1)
    assert swapped_accuracy(Corner(0, 0), images, labels, masks).isnan().all()


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="draws=0 must be a number of at least 1"):
        swapped_accuracy(Corner(0, 0), *data(), draws=0)
    with pytest.raises(InputError, match="seed=-1"):
        SwappedAccuracy(Corner(0, 0), seed=-1)
    images, _, masks = data(4)
    with pytest.raises(InputError, match=r"labels have shape \(4, 3\), logits \(4, 2\)"):
        swapped_accuracy(Corner(0, 0), images, torch.zeros(4, 3), masks)
