"""Swapping of what is outside the masks, against images whose every pixel says where it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnguide.errors import InputError
from attnguide.masks import SwapOutside

SIDE = 16
OBJECT = 100.0


def scenes(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Images of one gray value n outside and 100 + n inside a square that moves, labels, and masks."""
    masks = torch.zeros(batch, SIDE, SIDE)
    for n in range(batch):
        masks[n, n : n + 6, 2 * n : 2 * n + 5] = 1
    number = torch.arange(batch, dtype=torch.float32)[:, None, None]
    images = (number + OBJECT * masks)[:, None].expand(-1, 3, -1, -1).clone()
    return images, torch.arange(batch) % 2, masks


def test_the_inside_stays_and_the_outside_is_that_of_the_partner_without_its_object() -> None:
    images, labels, masks = scenes()
    swapped = SwapOutside("other")(images, labels, masks)
    assert bool(swapped.exchanged.all())
    assert bool((labels[swapped.partner] != labels).all())
    for n, partner in enumerate(swapped.partner.tolist()):
        expected = torch.where(masks[n] > 0, OBJECT + n, float(partner))
        torch.testing.assert_close(swapped.images[n], expected.expand(3, -1, -1))
    torch.testing.assert_close(swapped.masks, masks)


def test_soft_edges_blend() -> None:
    images, labels, masks = scenes(2)
    masks[0, 0, 0] = 0.25
    images[0, :, 0, 0] = 8.0
    swapped = SwapOutside()(images, labels, masks)
    # A quarter of the own pixel, three quarters of the partner's outside, whose value is 1.
    assert swapped.images[0, 0, 0, 0].item() == pytest.approx(0.25 * 8 + 0.75 * 1)
    # Nothing of the mixed pixel comes along.
    assert swapped.images[1, 0, 0, 0].item() == pytest.approx(0.0)


@pytest.mark.parametrize("form", ["nan", "ignored", "list", "channel", "numpy"])
def test_an_image_without_a_mask_stays_and_gives_nothing(form: str) -> None:
    images, labels, masks = scenes()
    given: Any = masks.clone()
    if form == "list":
        given = [None, *masks[1:]]
    elif form == "ignored":
        given[0] = -1
    else:
        given[0] = torch.nan
    given = given[:, None] if form == "channel" else given.numpy() if form == "numpy" else given
    swapped = SwapOutside()(images, labels, given)
    assert swapped.exchanged.tolist() == [False] + [True] * 5
    assert swapped.partner[0] == 0
    assert 0 not in swapped.partner[1:].tolist()
    torch.testing.assert_close(swapped.images[0], images[0], rtol=0, atol=0)
    assert bool(swapped.masks[0].isnan().all())


def test_without_any_mask_nothing_changes() -> None:
    images, labels, _ = scenes()
    swapped = SwapOutside()(images, labels, None)
    assert not bool(swapped.exchanged.any())
    torch.testing.assert_close(swapped.images, images, rtol=0, atol=0)


def test_an_image_that_is_all_inside_is_partner_to_none_and_stays_as_it_is() -> None:
    images, labels, masks = scenes()
    masks[1] = 1
    swapped = SwapOutside()(images, labels, masks)
    assert 1 not in swapped.partner[torch.arange(6) != 1].tolist()
    torch.testing.assert_close(swapped.images[1], images[1])


def test_a_mask_that_lost_its_object_can_be_skipped() -> None:
    images, labels, masks = scenes()
    masks[2] = 0
    swapped = SwapOutside(empty="skip")(images, labels, masks)
    assert swapped.exchanged.tolist() == [True, True, False, True, True, True]
    assert 2 not in swapped.partner[torch.arange(6) != 2].tolist()
    torch.testing.assert_close(swapped.images[2], images[2], rtol=0, atol=0)


def test_one_label_alone_takes_any_partner_and_several_labels_differ_in_any() -> None:
    images, _, masks = scenes()
    assert bool(SwapOutside("other")(images, torch.zeros(6), masks).exchanged.all())
    several = torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 0], [1, 0], [1, 0]])
    partner = SwapOutside("other")(images, several, masks).partner.tolist()
    assert partner[:2] + partner[3:] == [2] * 5
    assert partner[2] != 2


def test_a_single_mask_is_that_of_all_and_small_ones_grow() -> None:
    images, labels, masks = scenes()
    one = SwapOutside()(images, labels, masks[0])
    torch.testing.assert_close(one.masks, masks[:1].expand(6, -1, -1))
    small = SwapOutside()(images, labels, torch.ones(6, 4, 4) * torch.tensor([1.0, 1, 0, 0])[:, None])
    assert small.masks.shape == (6, SIDE, SIDE)
    assert bool((small.masks[:, :4] == 1).all())
    assert bool((small.masks[:, -4:] == 0).all())


def test_the_share_of_exchanged_images_is_the_probability() -> None:
    images, labels, masks = scenes(2)
    counts = [int(SwapOutside(probability=0.25)(images, labels, masks).exchanged.sum()) for _ in range(400)]
    assert sum(counts) / 800 == pytest.approx(0.25, abs=0.06)
    assert not bool(SwapOutside(probability=0)(images, labels, masks).exchanged.any())


def test_draws_depend_on_the_generator_alone() -> None:
    images, labels, masks = scenes()
    state = torch.get_rng_state()
    first, second = (
        SwapOutside()(images, labels, masks, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.partner, second.partner)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_type(kind: torch.dtype) -> None:
    images, labels, masks = scenes()
    swapped = SwapOutside()(images.to(kind), labels, masks)
    assert swapped.images.dtype == kind
    assert bool(swapped.images.isfinite().all())


def test_where_no_image_finds_a_partner_it_says_so() -> None:
    images, labels, masks = scenes()
    with pytest.warns(UserWarning, match="none of the 1 images with a mask"):
        swapped = SwapOutside()(images[:1], labels[:1], masks[:1])
    torch.testing.assert_close(swapped.images, images[:1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.ones(6, 2, SIDE, SIDE)}, r"masks\.amax\(dim=1\)"),
        ({"masks": torch.ones(6, SIDE, SIDE) * 255}, r"mask 0 has values outside \[0, 1\].*divide"),
        ({"masks": torch.eye(SIDE).log().nan_to_num(nan=0, neginf=torch.nan).expand(6, -1, -1)}, "in places"),
        ({"masks": torch.ones(6, SIDE, 2 * SIDE)}, "proportions"),
        ({"masks": torch.zeros(6, SIDE, SIDE)}, "mask 0 is empty.*empty='skip'"),
        ({"masks": [None] * 5}, "5 masks for 6 images"),
        ({"masks": [None] * 5 + [torch.ones(2, SIDE, SIDE)]}, "mask 5 has shape"),
        ({"masks": "mask"}, "masks='mask' must be a tensor"),
        ({"images": torch.ones(6, 3, SIDE, SIDE, dtype=torch.uint8)}, "floats"),
        ({"images": np.ones((6, 3, SIDE, SIDE))}, "floats"),
        ({"labels": torch.zeros(5)}, "labels have shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    images, labels, masks = scenes()
    arguments = {"images": images, "labels": labels, "masks": masks, **change}
    with pytest.raises(InputError, match=message):
        SwapOutside()(**arguments)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="partners='others'"):
        SwapOutside("others")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty='drop'"):
        SwapOutside(empty="drop")  # type: ignore[arg-type]
    for wrong in (1.5, float("nan"), "all"):
        with pytest.raises(InputError, match="probability="):
            SwapOutside(probability=wrong)  # type: ignore[arg-type]
