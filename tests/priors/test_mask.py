"""Masks as maps: averaged over cells, for all images, each image, each class, or a template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from attnguide.errors import InputError
from attnguide.interfaces import PriorMaps
from attnguide.pairs import resolve
from attnguide.priors.mask import MaskPrior
from attnguide.trace import Trace

MASKS = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def drawn(prior: MaskPrior, targets: Any = "all", **annotations: Any) -> PriorMaps:
    logits = torch.zeros(3, 2)
    trace = Trace(torch.zeros(3, 3, 8, 8), logits, {})
    given = prior(trace, resolve(targets, logits), (4, 2), **annotations)
    return given if isinstance(given, PriorMaps) else PriorMaps(given, torch.ones(len(given)))


def test_cells_are_averages_of_the_mask() -> None:
    found = drawn(MaskPrior(), mask=MASKS)
    expected = avg_pool2d(MASKS[:, None], (2, 4))[:, 0]
    torch.testing.assert_close(found.maps, expected.repeat_interleave(2, 0))
    assert found.weights.tolist() == [1] * 6


def test_masks_of_single_classes() -> None:
    by_class = torch.stack([MASKS, 1 - MASKS], dim=1)
    found = drawn(MaskPrior(), mask=by_class)
    torch.testing.assert_close(found.maps[::2], avg_pool2d(MASKS[:, None], (2, 4))[:, 0])
    torch.testing.assert_close(found.maps[1::2], 1 - found.maps[::2])


def test_a_template_is_the_same_for_every_image() -> None:
    template = torch.stack([MASKS[0], MASKS[1]])
    found = drawn(MaskPrior(template=template))
    assert torch.equal(found.maps[:2], found.maps[2:4])
    torch.testing.assert_close(found.maps[:2], avg_pool2d(template[:, None], (2, 4))[:, 0])


def test_no_annotation_and_empty_masks() -> None:
    missing = MASKS.clone()
    missing[1] = torch.nan
    assert drawn(MaskPrior(), mask=missing).weights.tolist() == [1, 1, 0, 0, 1, 1]
    assert drawn(MaskPrior(), mask=[MASKS[0], None, MASKS[2]]).weights.tolist() == [1, 1, 0, 0, 1, 1]
    empty = MASKS * torch.tensor([1.0, 0, 1])[:, None, None]
    assert drawn(MaskPrior(empty="skip"), mask=empty).weights.tolist() == [1, 1, 0, 0, 1, 1]
    with pytest.raises(InputError, match=r"sample 1.*empty"):
        drawn(MaskPrior(), mask=empty)


@pytest.mark.parametrize("mask", [torch.zeros(2, 8, 8), MASKS * 2, torch.zeros(3, 5, 8, 8), "mask"])
def test_masks_that_cannot_be(mask: Any) -> None:
    with pytest.raises(InputError):
        drawn(MaskPrior(), mask=mask)


def test_masks_by_class_index() -> None:
    found = drawn(MaskPrior(), mask=[{1: MASKS[0]}, None, {0: MASKS[1], 1: torch.ones(4, 4)}])
    assert found.weights.tolist() == [0, 1, 0, 0, 1, 1]
    torch.testing.assert_close(found.maps[1], avg_pool2d(MASKS[:1], (2, 4))[0])
    torch.testing.assert_close(found.maps[4], avg_pool2d(MASKS[1:2], (2, 4))[0])
    assert bool((found.maps[5] == 1).all())
    for wrong, message in [
        ({2: MASKS[0]}, "masks of sample 1 name a class 2; classes are indices from 0 to 1"),
        ({"smile": MASKS[0]}, "name a class 'smile'"),
        ({1: MASKS}, r"mask of sample 1, class 1, has shape \(3, 8, 8\); it must be \(H, W\)"),
        ({1: MASKS[0] * 2}, r"mask of sample 1, class 1, .*0.*2"),
        ({0: MASKS[0] * 0}, r"mask of sample 1, class 0, is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            drawn(MaskPrior(), mask=[None, wrong, {0: None}])


def test_masks_of_other_proportions() -> None:
    """They would be stretched: those of another image, or of one that was cropped or turned."""
    height, width = 8, 8
    upright = torch.ones(height * 2, width)
    for mask in (upright, upright.expand(3, -1, -1), [upright, None, None]):
        with pytest.raises(InputError, match=rf"has {height * 2} rows and {width} columns, the images have"):
            drawn(MaskPrior(), mask=mask)
    with pytest.raises(InputError, match="the template has"):
        drawn(MaskPrior(upright))
    assert drawn(MaskPrior(), mask=torch.ones(height // 2, width // 2)).weights.all()
