"""The mathematics, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnguide import functional as F
from attnguide.errors import InputError

LEFT = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])


def maps(*rows: list[float]) -> Tensor:
    return torch.tensor([rows])


# ------------------------------------------------------------------ attribution


def test_the_cam_family_on_two_channels() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # (1, 2, 1, 2)
    gradients = torch.tensor([[[[1.0, 3.0]], [[-2.0, 0.0]]]])
    # Mean gradients are 2 and -1.
    assert F.grad_cam(features, gradients, relu=False).tolist() == [[[-1.0, 5.0]]]
    assert F.grad_cam(features, gradients).tolist() == [[[0.0, 5.0]]]
    assert F.hires_cam(features, gradients, relu=False).tolist() == [[[-5.0, 6.0]]]
    assert F.hires_cam(features, gradients).tolist() == [[[0.0, 6.0]]]
    assert F.layer_cam(features, gradients).tolist() == [[[1.0, 6.0]]]
    assert F.channel_mean(features).tolist() == [[[2.0, 0.5]]]
    # Grad-CAM++: alpha = g² / (2 g² + Σ A · g³); Σ A is 3 in channel 0, which alone has positive gradients.
    weight = 1 / (2 + 3 * 1) * 1 + 9 / (18 + 3 * 27) * 3
    expected = torch.tensor([[[weight * 1.0, weight * 2.0]]])
    torch.testing.assert_close(F.grad_cam_plus_plus(features, gradients), expected)


def test_half_precision_is_added_up_in_full() -> None:
    features = torch.full((1, 512, 2, 2), 300.0).half()
    gradients = torch.full((1, 512, 2, 2), 2.0).half()
    for function in (F.grad_cam, F.hires_cam, F.layer_cam):
        assert function(features, gradients).unique().tolist() == [512 * 600.0]  # beyond what half can hold
    assert F.channel_mean(features).dtype == torch.float32
    assert F.full_precision(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------------- scaling


def test_rectify_keeps_what_is_positive_and_a_trace_of_the_rest() -> None:
    cases = {
        (0.0, 1.0, 2.0): (0.0, 1.001, 2.002),
        (-1.0, 0.5, 2.0): (0.0, 0.5015, 2.003),
        (-3.0, -2.0, -1.0): (0.0, 0.001, 0.002),
        (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
        (-3.0, -3.0, -3.0): (0.0, 0.0, 0.0),
    }
    for values, expected in cases.items():
        torch.testing.assert_close(F.rectify(maps(list(values))), maps(list(expected)))


@pytest.mark.parametrize("outside", [-0.1, 2.0])
def test_rectify_leaves_a_gradient_where_there_is_no_evidence(outside: float) -> None:
    signed = torch.tensor([[[-1.0, -0.5], [-0.2, outside]]], requires_grad=True)
    prior = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    (gradient,) = torch.autograd.grad(F.iou_loss(F.rectify(signed), prior).sum(), signed)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 0, 1]) < 0 < float(gradient[0, 1, 1])  # up inside the prior, down outside


def test_unit_scales_the_positive_part_to_one() -> None:
    assert F.unit(maps([-3.0, 0.0], [1.0, 4.0])).tolist() == [[[0.0, 0.0], [0.25, 1.0]]]
    for flat in (0.0, -5.0):
        assert not bool(F.unit(torch.full((2, 3, 3), flat)).any())
    assert F.unit(torch.full((1, 2, 2), 7.0)).unique().tolist() == [1.0]


def test_min_max() -> None:
    assert F.min_max(maps([-1.0, 0.0], [1.0, 3.0])).tolist() == [[[0.0, 0.25], [0.5, 1.0]]]
    assert not bool(F.min_max(torch.full((1, 2, 2), 3.0)).any())


def test_resize_averages_down_and_interpolates_up() -> None:
    assert F.resize(maps([1.0, 0.0, 0.0, 4.0]), (1, 2)).tolist() == [[[0.5, 2.0]]]
    up = F.resize(maps([0.0, 1.0]), (1, 4))
    torch.testing.assert_close(up, maps([0.0, 0.25, 0.75, 1.0]))
    same = torch.rand(2, 3, 5)
    assert F.resize(same, (3, 5)) is same
    noise = (torch.rand(3, 13, 21) > 0.5).float()
    for size in ((4, 4), (13, 7), (50, 5), (5, 50), (40, 60), (1, 1)):
        resized = F.resize(noise, size)
        assert resized.shape == (3, *size)
        assert float(resized.min()) >= 0
        assert float(resized.max()) <= 1 + 1e-6
    torch.testing.assert_close(F.resize(noise, (1, 1))[:, 0, 0], noise.mean(dim=(1, 2)))


# ----------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("attribution", "overlap"),
    [
        (LEFT * 7, 1.0),
        (maps([1.0, 1.0], [1.0, 1.0]), 0.5),
        (maps([1.0, 0.0], [0.0, 0.0]), 0.5),
        (maps([2.0, 1.0], [0.0, 0.0]), 1 / 2.5),
        (maps([1.0, -9.0], [1.0, -9.0]), 1.0),
    ],
)
def test_iou(attribution: Tensor, overlap: float) -> None:
    assert float(F.iou_loss(attribution, LEFT)) == pytest.approx(-math.log(overlap), abs=1e-5)


def test_iou_without_overlap_is_finite_and_still_pulls() -> None:
    attribution = maps([0.0, 1.0], [0.0, 1.0]).requires_grad_()
    loss = F.iou_loss(attribution, LEFT)
    assert 10 < float(loss.detach()) < 20
    loss.sum().backward()


@pytest.mark.parametrize(
    ("attribution", "expected"),
    [
        (LEFT * 3, 0.0),
        (-LEFT, 2.0),
        (1 - LEFT, 1.0),
        (maps([1.0, 1.0], [1.0, 1.0]), 1 - 1 / math.sqrt(2)),
        (torch.zeros(1, 2, 2), 1.0),
        (LEFT * 1e-20, 0.0),
    ],
)
def test_cosine(attribution: Tensor, expected: float) -> None:
    assert float(F.cosine_loss(attribution, LEFT)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("attribution", "expected"),
    [
        (LEFT * 3, 0.0),
        (1 - LEFT, 1.0),
        (maps([3.0, 1.0], [0.0, 0.0]), 0.25),
        (maps([3.0, 1.0], [-8.0, -8.0]), 0.25),
        (torch.zeros(1, 2, 2), 1.0),
    ],
)
def test_energy(attribution: Tensor, expected: float) -> None:
    assert float(F.energy_loss(attribution, LEFT)) == pytest.approx(expected, abs=1e-6)


def test_mse() -> None:
    assert float(F.mse_loss(LEFT * 5, LEFT)) == 0
    assert float(F.mse_loss(maps([4.0, 2.0], [0.0, 0.0]), LEFT)) == pytest.approx((0.25 + 1) / 4)


@pytest.mark.parametrize("loss", [F.iou_loss, F.dice_loss])
@pytest.mark.parametrize("faint", [0.5, 0.15, 0.004])
def test_a_faint_prior_guides_as_a_full_one(loss: Callable[..., Tensor], faint: float) -> None:
    """The gradient of a prior of 0.15 points to the region, and not away from it."""
    region = torch.zeros(2, 12, 12)
    region[0, 2:7, 3:9] = 1
    region[1] = torch.linspace(0, 1, 12)
    attribution = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (right,) = torch.autograd.grad(loss(attribution, region).sum(), attribution)
    (given,) = torch.autograd.grad(loss(attribution, region * faint).sum(), attribution)
    assert torch.nn.functional.cosine_similarity(right.flatten(1), given.flatten(1)).min() >= 0.99
    inside = right[0][region[0] > 0]
    assert (inside < 0).float().mean() > 0.9  # descent raises the attribution there


def test_the_norm_of_a_gradient_has_derivatives_where_it_is_zero_too() -> None:
    gradients = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(F.gradient_norm(gradients), torch.linalg.vector_norm(gradients, dim=1))
    assert torch.autograd.gradcheck(F.gradient_norm, gradients)
    assert torch.autograd.gradgradcheck(F.gradient_norm, gradients)
    zeros = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(F.gradient_norm(zeros).sum(), zeros, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zeros)
    assert not first.any()
    assert not second.any()


def test_a_full_prior_is_not_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    attribution, prior = torch.rand(2, 3, 9, 9, generator=generator)
    prior[:, 4, 4] = 1
    scaled = F.unit(attribution)
    least, most = torch.minimum(scaled, prior).mean((1, 2)), torch.maximum(scaled, prior).mean((1, 2))
    expected = (most + F.EPSILON).log() - (least + F.EPSILON).log()
    assert torch.equal(F.iou_loss(attribution, prior), expected)
    sizes = (scaled.square() + prior.square()).mean((1, 2))
    expected = 1 - (2 * (scaled * prior).mean((1, 2)) + F.EPSILON) / (sizes + F.EPSILON)
    assert torch.equal(F.dice_loss(attribution, prior), expected)


def test_dice() -> None:
    assert float(F.dice_loss(LEFT * 5, LEFT)) == pytest.approx(0, abs=1e-5)
    assert float(F.dice_loss(1 - LEFT, LEFT)) == pytest.approx(1, abs=1e-5)
    # G = (1, 0.5, 0, 0), S = (1, 0, 1, 0): 1 − 2·1 / (1.25 + 2).
    assert float(F.dice_loss(maps([4.0, 2.0], [0.0, 0.0]), LEFT)) == pytest.approx(1 - 2 / 3.25, abs=1e-5)
    assert float(F.dice_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))) == 0


def test_kl() -> None:
    assert float(F.kl_loss(LEFT * 5, LEFT)) == pytest.approx(0, abs=1e-4)
    # s = (½, 0, ½, 0), g = (½, 0, ¼, ¼): ½·ln 1 + ½·ln 2.
    assert float(F.kl_loss(maps([2.0, 0.0], [1.0, 1.0]), LEFT)) == pytest.approx(math.log(2) / 2, abs=1e-4)
    assert float(F.kl_loss(maps([1.0, 2.0], [1.0, 1.0]), torch.zeros(1, 2, 2))) == 0
    assert 10 < float(F.kl_loss(1 - LEFT, LEFT)) < 20


def test_standardised_cosine_is_one_minus_the_correlation() -> None:
    attribution, prior = torch.randn(1, 5, 6), torch.rand(1, 5, 6)
    expected = 1 - torch.corrcoef(torch.stack([attribution.flatten(), prior.flatten()]))[0, 1]
    assert float(F.correlation_loss(attribution, prior)) == pytest.approx(float(expected), abs=1e-5)
    lifted = F.correlation_loss(attribution + 7, prior)
    assert float(lifted) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("distance", "mode", "expected"),
    [
        # Scaled, (1, 0.5, 0, 0.25); the prior is (1, 0, 1, 0).
        ("absolute", "match", [0.0, 0.5, 1.0, 0.25]),
        ("squared", "match", [0.0, 0.25, 1.0, 0.0625]),
        ("absolute", "suppress", [0.0, 0.5, 0.0, 0.25]),
        ("squared", "suppress", [0.0, 0.25, 0.0, 0.0625]),
        ("absolute", "reward", [0.0, 0.0, 1.0, 0.0]),
        ("squared", "reward", [0.0, 0.0, 1.0, 0.0]),
        ("cross_entropy", "reward", [0.0, 0.0, -math.log(F.EPSILON), 0.0]),
        ("cross_entropy", "suppress", [0.0, math.log(2), 0.0, -math.log(0.75)]),
        ("cross_entropy", "match", [0.0, math.log(2), -math.log(F.EPSILON), -math.log(0.75)]),
    ],
)
def test_distances_by_hand(distance: str, mode: str, expected: list[float]) -> None:
    attribution, settings = maps([4.0, 2.0], [0.0, 1.0]), {"distance": distance, "mode": mode}
    total = sum(expected)
    count = 4 if mode == "match" else 2
    assert float(F.pointwise_loss(attribution, LEFT, **settings)) == pytest.approx(total / count, abs=1e-4)  # type: ignore[arg-type]
    found = F.pointwise_loss(attribution, LEFT, **settings, reduction="sum")  # type: ignore[arg-type]
    assert float(found) == pytest.approx(total, abs=1e-4)


def test_scales_by_hand() -> None:
    attribution = maps([2.0, -4.0], [1.0, 1.0])
    for scale, expected in (("none", 16 + 1), ("signed", 1 + 1 / 16), ("unit", 0.25)):
        found = F.pointwise_loss(attribution, LEFT, "squared", "suppress", scale, "sum")  # type: ignore[arg-type]
        assert float(found) == pytest.approx(expected)


def test_where_no_position_counts_there_is_no_loss() -> None:
    for mode, prior in (("suppress", torch.ones(1, 2, 2)), ("reward", torch.zeros(1, 2, 2))):
        assert float(F.pointwise_loss(torch.rand(1, 2, 2), prior, mode=mode)) == 0  # type: ignore[arg-type]


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(InputError, match=r"mode='supress' is unknown.*suppress"):
        F.pointwise_loss(LEFT, LEFT, mode="supress")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale='signed' must be 'unit'"):
        F.pointwise_loss(LEFT, LEFT, distance="cross_entropy", scale="signed")


@pytest.mark.parametrize(
    "loss", [F.iou_loss, F.cosine_loss, F.energy_loss, F.mse_loss, F.dice_loss, F.kl_loss, F.correlation_loss]
)
def test_losses_refuse_maps_that_do_not_fit(loss: object) -> None:
    with pytest.raises(InputError, match=r"\(1, 2, 2\).*\(1, 4, 4\).*resize"):
        loss(LEFT, torch.ones(1, 4, 4))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        loss(LEFT[0], LEFT[0])  # type: ignore[operator]


@pytest.mark.parametrize(
    "loss", [F.iou_loss, F.cosine_loss, F.energy_loss, F.mse_loss, F.dice_loss, F.kl_loss, F.correlation_loss]
)
def test_descent_leads_to_the_prior(loss: object) -> None:
    attribution = torch.rand(1, 6, 6).requires_grad_()
    prior = torch.zeros(1, 6, 6)
    prior[:, 1:4, 2:5] = 1
    optimiser = torch.optim.Adam([attribution], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss(attribution, prior).sum().backward()  # type: ignore[operator]
        optimiser.step()
    found = F.unit(attribution.detach())
    assert float((found * prior).sum() / found.sum()) > 0.95


# ---------------------------------------------------------------- interventions


def test_divergences_of_two_predictions() -> None:
    first, second = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.8]]).log()
    kl = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    js = (
        0.9 * math.log(0.9 / 0.55)
        + 0.1 * math.log(0.1 / 0.45)
        + 0.2 * math.log(0.2 / 0.55)
        + 0.8 * math.log(0.8 / 0.45)
    ) / 2
    assert float(F.divergence(first, second, "kl")) == pytest.approx(kl)
    assert float(F.divergence(first, second)) == pytest.approx(js)
    # What all logits have in common is no part of a softmax.
    for how in F.DIVERGENCES:
        assert float(F.divergence(first, first + 3, how)) == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[1.0, 4.0, -1.0]]), torch.tensor([[3.0, 0.0, -1.0]])
    assert float(F.divergence(*logits, "logits", independent=True)) == pytest.approx((4 + 16 + 0) / 3)
    # The largest: two predictions that are certain of different classes. Extreme logits stay finite.
    far = torch.tensor([[1e4, -1e4]], requires_grad=True)
    largest = F.divergence(far, -far.detach())
    assert largest.item() == pytest.approx(math.log(2))
    largest.backward()
    assert far.grad is not None
    assert bool(far.grad.isfinite().all())


def test_divergence_of_classes_that_are_predicted_by_themselves() -> None:
    chances = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.2, 0.5]])
    logits = [torch.logit(each) for each in chances]
    kl = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    assert float(F.divergence(*logits, "kl", independent=True)) == pytest.approx(kl / 2)


def test_divergence_refuses_what_it_does_not_know() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"divergence='tv' is unknown: js, kl, logits\."):
        F.divergence(logits, logits, "tv")
    with pytest.raises(InputError, match=r"\(2, 3\) and \(3, 3\)"):
        F.divergence(logits, torch.zeros(3, 3))


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (16, 16), (3, 33)])
def test_inpaint_keeps_the_outside_and_goes_on_with_it(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) + 1
    masks = torch.zeros(2, 1, *size)
    torch.testing.assert_close(F.inpaint(images, masks), images)
    masks[0, :, : (size[0] + 1) // 2] = 1
    masks[1] = 0.01  # an edge holds something of the object
    filled = F.inpaint(torch.where(masks > 0, 1e6, images), masks)
    outside = (masks[0] == 0).expand(3, -1, -1)
    torch.testing.assert_close(filled[0][outside], images[0][outside])
    assert bool((filled[1] == 0).all())
    if size[0] > 1:
        # Averages of what is outside never leave its range.
        assert bool((filled[0] >= images[0][outside].min() - 1e-5).all())
        assert bool((filled[0] <= images[0][outside].max() + 1e-5).all())


def test_inpaint_takes_what_is_near() -> None:
    images = torch.zeros(1, 1, 16, 16)
    images[..., 8:] = 1  # the left half is dark, the right one bright
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 6:10, 2:4] = masks[..., 6:10, 12:14] = 1
    filled = F.inpaint(torch.where(masks > 0, 9.0, images), masks)
    torch.testing.assert_close(filled, images)
