"""The mathematics, as pure tensor functions.

Maps are batches of shape `(N, h, w)`, one map for each (sample, class) pair. Every function is
differentiable, works on any device, computes half precision in float32 and gives one result per map, so that
nothing here depends on the batch size. Unless a setting says otherwise, the losses are also invariant to the
scale of the attribution and (up to resampling) to its resolution.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.errors import InputError, nearest

__all__ = [
    "Distance",
    "Mode",
    "Reduction",
    "Scale",
    "channel_mean",
    "combine",
    "correlation_loss",
    "cosine_loss",
    "dice_loss",
    "divergence",
    "energy_loss",
    "erase",
    "full_precision",
    "full_precision_mode",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_norm",
    "hires_cam",
    "inpaint",
    "inside_outside_loss",
    "iou_loss",
    "kl_loss",
    "layer_cam",
    "may_read",
    "min_max",
    "mse_loss",
    "pointwise_loss",
    "reading",
    "rectify",
    "resize",
    "signed",
    "unit",
    "xgrad_cam",
]

EPSILON = 1e-6
#: Weight of the values that plain rectification drops; well above EPSILON, and too small to show in a map.
LEAK = 1e-3


def as_tensor(value: object, name: str) -> Tensor:
    """Return numbers, such as a nested list, as a tensor; a tensor as it is.

    Raises:
        InputError: If they are none.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name}={value!r:.60} must be a tensor, or numbers that make one.") from error


def full_precision(tensor: Tensor) -> Tensor:
    """Return half precision as float32, anything else unchanged; reductions in half precision overflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# ---------------------------------------------------------------- attribution


@contextmanager
def full_precision_mode(device: torch.device) -> Iterator[None]:
    """Leave autocast on a device, for results that half precision would spoil."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


class _Reading(threading.local):
    """How many callers in this thread allow values on accelerators to be read."""

    depth = 0


_reading = _Reading()


def may_read(tensor: Tensor) -> bool:
    """Whether a value of a tensor may be read now: always on the CPU, elsewhere if a caller allows it.

    Reading a value on an accelerator makes the host wait. Checks of values are worth a wait once, at the
    first step of a training, and never again. While a model is exported or compiled there are no values.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return tensor.device.type == "cpu" or _reading.depth > 0


@contextmanager
def reading() -> Iterator[None]:
    """Allow values on any device to be read in this thread; see `may_read`."""
    _reading.depth += 1
    try:
        yield
    finally:
        _reading.depth -= 1


def grad_cam(features: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """Grad-CAM: each channel weighted by its mean gradient (Selvaraju et al., ICCV 2017, eqs. 1 and 2).

    Args:
        features: Feature maps `(N, C, h, w)`.
        gradients: Gradient of the class score with respect to them, `(N, C, h, w)`.
        relu: Keep only the evidence for the class; without it the map is signed.

    Returns:
        Maps `(N, h, w)`, not rescaled.
    """
    features, gradients = full_precision(features), full_precision(gradients)
    maps = (gradients.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)
    return maps.relu() if relu else maps


def grad_cam_plus_plus(features: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """Grad-CAM++: positive gradients weighted by how much each position counts.

    Chattopadhay et al., WACV 2018, eq. 19. Second and third derivatives are powers of the first, as the paper
    derives for an exponential score. The constant in the denominator is that of the established
    implementation (pytorch-grad-cam, 1e-6). It matters where gradients are small, and is kept to agree.

    Args:
        features: Feature maps `(N, C, h, w)`.
        gradients: Gradient of the class score with respect to them, `(N, C, h, w)`.
        relu: Keep only the evidence for the class.

    Returns:
        Maps `(N, h, w)`, not rescaled.
    """
    features, gradients = full_precision(features), full_precision(gradients)
    squared = gradients.square()
    denominator = 2 * squared + features.sum(dim=(2, 3), keepdim=True) * squared * gradients + EPSILON
    alpha = torch.where(gradients != 0, squared / denominator, torch.zeros_like(squared))
    weights = (alpha * gradients.relu()).sum(dim=(2, 3), keepdim=True)
    maps = (weights * features).sum(dim=1)
    return maps.relu() if relu else maps


def layer_cam(features: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """LayerCAM: each position weighted by its own positive gradient (Jiang et al., TIP 2021, eqs. 6 to 8).

    Args:
        features: Feature maps `(N, C, h, w)`.
        gradients: Gradient of the class score with respect to them, `(N, C, h, w)`.
        relu: Keep only the evidence for the class.

    Returns:
        Maps `(N, h, w)`, not rescaled.
    """
    maps = (full_precision(gradients).relu() * full_precision(features)).sum(dim=1)
    return maps.relu() if relu else maps


def hires_cam(features: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """HiResCAM: gradient times feature at each position (Draelos and Carin, arXiv 2011.08891, eq. 4).

    Args:
        features: Feature maps `(N, C, h, w)`.
        gradients: Gradient of the class score with respect to them, `(N, C, h, w)`.
        relu: Keep only the evidence for the class; without it the map is signed, as in the paper.

    Returns:
        Maps `(N, h, w)`, not rescaled.
    """
    maps = (full_precision(gradients) * full_precision(features)).sum(dim=1)
    return maps.relu() if relu else maps


def xgrad_cam(features: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """XGrad-CAM: each channel weighted by its gradients, averaged where it is active (Fu et al., BMVC 2020).

    The weight of channel k is Σ F_k·∂s/∂F_k / Σ F_k, eq. 8. A channel whose sum is zero has weight 0.

    Args:
        features: Feature maps `(N, C, h, w)`.
        gradients: Gradient of the class score with respect to them, `(N, C, h, w)`.
        relu: Keep only the evidence for the class; without it the map is signed.

    Returns:
        Maps `(N, h, w)`, not rescaled.
    """
    features, gradients = full_precision(features), full_precision(gradients)
    total = features.sum(dim=(2, 3), keepdim=True)
    active = total.abs() > EPSILON
    products = (features * gradients).sum(dim=(2, 3), keepdim=True)
    weights = torch.where(active, products / torch.where(active, total, torch.ones_like(total)), 0.0)
    maps = (weights * features).sum(dim=1)
    return maps.relu() if relu else maps


def gradient_norm(gradients: Tensor) -> Tensor:
    """Norm of the gradient over the channels: how strongly the score reacts to each position.

    Its square is what "Right for the right reasons" penalises (Ross et al., IJCAI 2017, eq. 3).

    Args:
        gradients: Gradient of the class score, `(N, C, h, w)`.

    Returns:
        Maps `(N, h, w)`, at least 0.
    """
    norms: Tensor = _ChannelNorm.apply(full_precision(gradients))
    return norms


class _ChannelNorm(torch.autograd.Function):
    """The norm along the channels, whose derivative where it is 0 is 0; PyTorch's own copies its input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        # Sums along this dimension are vectorized; `vector_norm` is along the last one alone.
        return values.square().sum(dim=1).sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        values, norms = ctx.saved_tensors
        found: Tensor = (outer / norms.masked_fill(norms == 0, math.inf))[:, None] * values
        return found


def channel_mean(features: Tensor) -> Tensor:
    """Layer attention: the mean over channels (Belharbi et al., FG 2024, arXiv 2402.00281).

    Args:
        features: Feature maps `(N, C, h, w)`.

    Returns:
        Maps `(N, h, w)`, signed where the features are.
    """
    return full_precision(features).mean(dim=1)


# -------------------------------------------------------------------- scaling


def rectify(maps: Tensor) -> Tensor:
    """Keep the positive part of each map, and a trace of the rest, for training.

    Plain rectification loses the gradient wherever there is no evidence for the class: a map that is negative
    throughout, or positive only outside the prior, could never be guided again. Here each value also
    counts, from the map's minimum upwards, with a weight of 0.001: too little to change a map that has
    evidence, enough to rank positions where it has none.

    Args:
        maps: Signed maps `(N, h, w)`.

    Returns:
        Maps `(N, h, w)`, at least 0; a flat map without a positive value becomes zeros.
    """
    return maps.relu() + LEAK * (maps - maps.amin(dim=(-2, -1), keepdim=True))


def unit(maps: Tensor) -> Tensor:
    """Scale the positive part of each map to a maximum of 1; a map without a positive value becomes zeros.

    Zero stays zero, so "no evidence here" keeps its meaning, which min-max scaling would lose.

    Args:
        maps: Maps `(N, h, w)`.

    Returns:
        Maps `(N, h, w)` in [0, 1].
    """
    positive = full_precision(maps).relu()
    peak = positive.amax(dim=(-2, -1), keepdim=True)
    return positive / torch.where(peak > 0, peak, torch.ones_like(peak))


def signed(maps: Tensor) -> Tensor:
    """Scale each map to a largest magnitude of 1, signs kept; a map of zeros stays as it is.

    Args:
        maps: Maps `(N, h, w)`.

    Returns:
        Maps `(N, h, w)` in [−1, 1].
    """
    maps = full_precision(maps)
    peak = maps.abs().amax(dim=(-2, -1), keepdim=True)
    return maps / torch.where(peak > 0, peak, torch.ones_like(peak))


def min_max(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1] by its minimum and maximum; a flat map becomes zeros. For display.

    Args:
        maps: Maps `(..., h, w)`.

    Returns:
        Maps of the same shape in [0, 1].
    """
    maps = full_precision(maps)
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps: area averaging where both sides shrink, antialiased bilinear interpolation otherwise.

    Args:
        maps: Maps `(N, h, w)`; float.
        size: Target `(h, w)`.

    Returns:
        Maps `(N, *size)`; values in [0, 1] stay there.
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    if size[0] <= height and size[1] <= width:
        return F.interpolate(maps[:, None], size=size, mode="area")[:, 0]
    # Where no side shrinks there is nothing to smooth, and the plain kernel is the faster one.
    shrinks = size[0] < height or size[1] < width
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False, antialias=shrinks)[
        :, 0
    ]


#: How maps of several layers are joined.
COMBINATIONS = ("mean", "max", "product")


def combine(maps: Sequence[Tensor], how: str = "mean") -> Tensor:
    """Join the maps of several layers, each scaled to a maximum of 1, at the largest of their resolutions.

    Args:
        maps: Maps of each layer, `(N, h, w)`; sizes may differ.
        how: `"mean"`, `"max"`, or `"product"` (only where all agree).

    Returns:
        Maps `(N, h, w)` in [0, 1]; a single layer's maps are returned as they are.

    Raises:
        InputError: If there are no maps, or the way is unknown.
    """
    if how not in COMBINATIONS or not maps:
        raise InputError(f"combine={how!r} for {len(maps)} layers: choose one of {', '.join(COMBINATIONS)}.")
    if len(maps) == 1:
        return maps[0]
    height, width = (max(layer.shape[axis] for layer in maps) for axis in (-2, -1))
    joined = torch.stack([resize(unit(layer), (height, width)) for layer in maps])
    if how == "mean":
        return joined.mean(dim=0)
    return joined.amax(dim=0) if how == "max" else joined.prod(dim=0)


# --------------------------------------------------------------------- losses


def iou_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """Negative logarithm of the soft intersection over union, −ln(Σ min(G, S) / Σ max(G, S)).

    G is the attribution and S the prior (Yang et al., 2019, arXiv 1905.00593), both scaled to a maximum of 1
    by [`unit`][attnguide.functional.unit]. S is scaled because G always reaches 1: beside a fainter S, such
    as a region smaller than a cell of the map, the union would grow with G inside the region too, and the
    gradient would push the attribution out of it. Without any overlap the loss is finite (about 14).

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)`, at least 0, any scale.

    Returns:
        Losses `(N,)`, from 0 (equal up to scale) upwards.

    Raises:
        InputError: If the shapes differ.
    """
    if attribution.ndim != 3 or attribution.shape != prior.shape:
        raise _mismatch(attribution, prior)
    scaled = unit(attribution)
    prior = unit(prior.to(scaled))
    # Means instead of sums: the ratio is the same, and the constant then weighs the same at any resolution.
    overlap = torch.minimum(scaled, prior).mean(dim=(1, 2))
    union = torch.maximum(scaled, prior).mean(dim=(1, 2))
    return (union + EPSILON).log() - (overlap + EPSILON).log()


def cosine_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """One minus the cosine between attribution and prior (Belharbi et al., FG 2024, arXiv 2402.00281).

    Signed attributions keep their sign. A map of zeros has cosine 0.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)` in [0, 1].

    Returns:
        Losses `(N,)` in [0, 2].

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    flat = attribution.flatten(1)
    # Dividing by the peak first keeps tiny maps clear of the constant inside the cosine.
    peak = flat.detach().abs().amax(dim=1, keepdim=True)
    flat = flat / torch.where(peak > 0, peak, torch.ones_like(peak))
    target = prior.flatten(1)
    # With a peak of 1 any map has a norm of at least 1: the limit is for zeros, where it bounds the gradient.
    norms = flat.norm(dim=1).clamp(min=1) * target.norm(dim=1).clamp(min=EPSILON)
    cosine: Tensor = (flat * target).sum(dim=1) / norms
    return 1 - cosine


def energy_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """Share of the positive attribution outside the prior, 1 − Σ S·A⁺ / Σ A⁺ (Rao et al., ICCV 2023).

    A map without a positive value has no energy anywhere: its loss is 1, its gradient 0.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)` in [0, 1].

    Returns:
        Losses `(N,)` in [0, 1].

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    scaled = unit(attribution)
    total = scaled.sum(dim=(1, 2))
    return 1 - (scaled * prior).sum(dim=(1, 2)) / torch.where(total > 0, total, torch.ones_like(total))


def dice_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, 1 − 2·Σ G·S / (Σ G² + Σ S²) (Milletari et al., 3DV 2016).

    G is the attribution and S the prior, both scaled to a maximum of 1 by
    [`unit`][attnguide.functional.unit], for the reason that [`iou_loss`][attnguide.functional.iou_loss]
    gives.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)`, at least 0, any scale.

    Returns:
        Losses `(N,)` in [0, 1]; 0 where both are zero throughout.

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    scaled, prior = unit(attribution), unit(prior)
    overlap = (scaled * prior).mean(dim=(1, 2))
    sizes = (scaled.square() + prior.square()).mean(dim=(1, 2))
    return 1 - (2 * overlap + EPSILON) / (sizes + EPSILON)


def kl_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """Kullback–Leibler divergence of the attribution from the prior, Σ s·ln(s / g), in nats.

    s and g are the prior and the positive attribution as distributions over the positions, each divided by
    its sum. The loss of a prior of zeros is 0.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)` in [0, 1].

    Returns:
        Losses `(N,)`, from 0 upwards; finite, since each position counts for a millionth of the peak.

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    scaled = (unit(attribution) + EPSILON).flatten(1)
    total = prior.sum(dim=(1, 2)).unsqueeze(1)
    target = prior.flatten(1) / torch.where(total > 0, total, torch.ones_like(total))
    log_share = scaled.log() - scaled.sum(dim=1, keepdim=True).log()
    return (torch.xlogy(target, target) - target * log_share).sum(dim=1)


def correlation_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """One minus the correlation of both maps: the cosine after their means are subtracted.

    Unlike [`cosine_loss`][attnguide.functional.cosine_loss] it does not depend on a constant in either map.
    A flat map has correlation 0.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)` in [0, 1].

    Returns:
        Losses `(N,)` in [0, 2].

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    return cosine_loss(
        attribution - attribution.mean(dim=(1, 2), keepdim=True), prior - prior.mean(dim=(1, 2), keepdim=True)
    )


#: The distance at a position.
Distance = Literal["absolute", "squared", "cross_entropy"]
#: What a map should be: like the prior, empty outside of it, or full inside.
Mode = Literal["match", "suppress", "reward"]
#: How a map is scaled first: its positive part to a maximum of 1, with its signs to one of ±1, or not.
Scale = Literal["unit", "signed", "none"]
#: How the losses of all positions are reduced to one.
Reduction = Literal["mean", "sum"]


def pointwise_loss(
    attribution: Tensor,
    prior: Tensor,
    distance: Distance = "squared",
    mode: Mode = "match",
    scale: Scale = "unit",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compare attribution and prior position by position.

    The distance is taken to the prior everywhere (`"match"`), to 0 outside the prior (`"suppress"`), or to 1
    inside (`"reward"`), where a soft prior is outside as far as it is not inside. Among these are:

    - absolute, match, mean: L1 (Rao et al., ICCV 2023);
    - cross entropy, reward, mean: PPCE (the same);
    - squared, suppress, signed, sum: the variant of "Right for the right reasons" of Rao et al.;
    - squared, suppress, not scaled, sum: "Right for the right reasons" (Ross et al., IJCAI 2017, eq. 3), for
      gradients; with maps of Grad-CAM and scaled, RRR-G (Friedrich et al., 2022);
    - squared, match, sum: HINT, in the typology of Friedrich et al.

    Args:
        attribution: Maps `(N, h, w)`.
        prior: Maps `(N, h, w)` in [0, 1].
        distance: Distance between a value and its target.
        mode: The targets, and the positions that count.
        scale: How each map is scaled first.
        reduction: `"mean"` over the positions that count, so that λ means the same at any resolution and for
            masks of any size; or `"sum"`, as in most publications.

    Returns:
        Losses `(N,)`, at least 0; 0 where no position counts.

    Raises:
        InputError: If the shapes differ, or a choice is unknown or impossible.
    """
    for name, value, kind in (
        ("distance", distance, Distance),
        ("mode", mode, Mode),
        ("scale", scale, Scale),
        ("reduction", reduction, Reduction),
    ):
        if value not in get_args(kind):
            raise InputError(f"{name}={value!r} is unknown.{nearest(str(value), get_args(kind))}")
    if distance == "cross_entropy" and scale != "unit":
        raise InputError(f"a cross entropy needs maps in [0, 1]: scale={scale!r} must be 'unit'.")
    attribution, prior = _comparable(attribution, prior)
    maps = attribution if scale == "none" else unit(attribution) if scale == "unit" else signed(attribution)
    target = prior if mode == "match" else torch.full_like(prior, float(mode == "reward"))
    difference = maps if mode == "suppress" else maps - target
    if distance == "absolute":
        losses = difference.abs()
    elif distance == "squared":
        losses = difference.square()
    else:
        losses = -(target * (maps + EPSILON).log() + (1 - target) * (1 - maps + EPSILON).log())
    if mode == "match":
        total = losses.sum(dim=(1, 2))
        return total if reduction == "sum" else total / losses[0].numel()
    counts = prior if mode == "reward" else 1 - prior
    total = (counts * losses).sum(dim=(1, 2))
    return total if reduction == "sum" else total / counts.sum(dim=(1, 2)).clamp(min=EPSILON)


def erase(images: Tensor, maps: Tensor, threshold: float = 0.5, steepness: float = 10.0) -> Tensor:
    """Erase from each image what its map covers: image · (1 − sigmoid(ω·(A − σ))) (Li et al., CVPR 2018).

    Args:
        images: `(N, C, H, W)`.
        maps: `(N, h, w)`, any scale; A is the map scaled to a maximum of 1, resized to the images.
        threshold: σ, the share of the maximum at which half is erased.
        steepness: ω, how sharp the border is.

    Returns:
        `(N, C, H, W)`; differentiable, in the maps too.
    """
    sized = resize(unit(maps), (images.shape[-2], images.shape[-1]))
    return images * (1 - torch.sigmoid(steepness * (sized - threshold)))[:, None]


def inside_outside_loss(
    attribution: Tensor, prior: Tensor, inside: float = 0.3, outside: float = 2.0
) -> Tensor:
    """Mean of w₋·(Â·(1 − S))² + w₊·(S·(Â − 1))²: low outside the prior, high inside (Chefer et al., 2022).

    Args:
        attribution: Maps `(N, h, w)`; Â is the map scaled to a maximum of 1.
        prior: Maps `(N, h, w)` in [0, 1], S.
        inside: Weight w₊ of what is missing inside.
        outside: Weight w₋ of what is outside.

    Returns:
        Losses `(N,)`, at least 0. Both are means over all positions.

    Raises:
        InputError: If the shapes differ.
    """
    attribution, prior = _comparable(attribution, prior)
    maps = unit(attribution)
    losses = outside * (maps * (1 - prior)).square() + inside * (prior * (maps - 1)).square()
    return losses.mean(dim=(1, 2))


def mse_loss(attribution: Tensor, prior: Tensor) -> Tensor:
    """Mean squared difference between the attribution, scaled to [0, 1], and the prior.

    Args:
        attribution: Maps `(N, h, w)`, any scale.
        prior: Maps `(N, h, w)` in [0, 1].

    Returns:
        Losses `(N,)` in [0, 1].

    Raises:
        InputError: If the shapes differ.
    """
    return pointwise_loss(attribution, prior)


def _comparable(attribution: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in full precision, on the device of the attribution."""
    if attribution.ndim != 3 or attribution.shape != prior.shape:
        raise _mismatch(attribution, prior)
    attribution = full_precision(attribution)
    return attribution, prior.to(attribution)


def _mismatch(attribution: Tensor, prior: Tensor) -> InputError:
    return InputError(
        f"attribution {tuple(attribution.shape)} and prior {tuple(prior.shape)} cannot be compared: "
        "both must be (N, h, w) of one shape. Resize one with attnguide.functional.resize."
    )


# ---------------------------------------------------------------- interventions


def inpaint(images: Tensor, masks: Tensor) -> Tensor:
    """Fill what is inside masks from around it, smoothly: the object is gone, its surroundings go on.

    Each pixel is an average of pixels outside, weighted by how far outside they are, over the smallest
    neighbourhood that has any: averages over areas that double step by step (a pull-push pyramid).

    Args:
        images: `(B, C, H, W)`.
        masks: What to fill, `(B, 1, H, W)` in [0, 1]; soft edges hold something of the object and are filled
            too.

    Returns:
        `(B, C, H, W)`, in full precision; unchanged where the mask is 0, and zero where all of the image is
        inside.
    """
    images = full_precision(images)
    known = masks == 0
    # What is known of each area, as sums of pixels and shares of the area.
    total, share = torch.where(known, images, 0.0), known.to(images.dtype)
    levels = []
    while max(share.shape[-2:]) > 1:
        total, share = _halved(total), _halved(share)
        levels.append((total, share))
    filled = torch.zeros_like(total)
    for total, share in reversed(levels):
        means = total / torch.where(share > 0, share, 1.0)
        filled = torch.where(share > 0, means, _grown(filled, means))
    return torch.where(known, images, _grown(filled, images))


def _halved(values: Tensor) -> Tensor:
    """Average 2×2 pixels; at a rim of odd size, those that there are."""
    return F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)


def _grown(values: Tensor, like: Tensor) -> Tensor:
    """Interpolate to the size of another tensor."""
    if values.shape == like.shape:
        return values
    return F.interpolate(values, like.shape[-2:], mode="bilinear", align_corners=False)


#: How two predictions are compared.
DIVERGENCES = ("js", "kl", "logits")


def divergence(first: Tensor, second: Tensor, how: str = "js", *, independent: bool = False) -> Tensor:
    """How much two predictions differ: 0 if they are the same.

    Args:
        first: Logits `(B, K)`.
        second: Logits `(B, K)`.
        how: `"js"`, the divergence of Jensen and Shannon, in [0, ln 2]; `"kl"`, that of Kullback and Leibler,
            of the second from the first, unbounded; `"logits"`, the mean squared difference of the logits.
        independent: Whether each class is predicted by itself (sigmoid); the divergence is then the mean over
            the classes. Otherwise the classes exclude each other (softmax), and what all logits of a sample
            have in common does not count.

    Returns:
        `(B,)`, in nats for `"js"` and `"kl"`.

    Raises:
        InputError: If shapes differ, or `how` is unknown.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(
            f"logits to compare have shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be "
            "(B, K)."
        )
    if how not in DIVERGENCES:
        raise InputError(f"divergence={how!r} is unknown: {', '.join(DIVERGENCES)}.")
    first, second = full_precision(first), full_precision(second)
    if how == "logits":
        difference = first - second
        if not independent:
            difference = difference - difference.mean(dim=1, keepdim=True)
        return difference.square().mean(dim=1)
    if independent:
        first, second = (torch.stack([logits, torch.zeros_like(logits)], dim=2) for logits in (first, second))
    p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    if how == "kl":
        per = (p.exp() * (p - q)).sum(dim=-1)
    else:
        middle = torch.logaddexp(p, q) - math.log(2)
        per = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(dim=-1) / 2
    return per.mean(dim=1) if independent else per
