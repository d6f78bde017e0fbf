"""Predicts the masks that a data set lacks from those that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide import functional
from attnguide.capture.calls import Tap
from attnguide.capture.model_state import evaluating, muted, unwrap
from attnguide.capture.suitable import check_images
from attnguide.errors import InputError, LayerError
from attnguide.layers._outputs import given_at, outputs_of
from attnguide.layers.candidates import list_candidates, stages
from attnguide.layers.finding import find_layers
from attnguide.masks.swapping import regions_of
from attnguide.trace import Layer

__all__ = ["MaskCompletion"]

#: Positions of an image that are learned from, and of all images.
_POSITIONS, _IN_ALL = 128, 40_000
#: Rounds in which masks that hold too much are narrowed.
_ROUNDS = 3
#: Where less of a region is left, it stays as it was given.
_LEAST = 0.1
#: Images in a pass.
_BATCH = 32
#: Strength of the penalty on the weights; features are standardized.
_PENALTY = 3e-2
#: Every so many-th image is held out to measure how well the masks of others are met.
_HELD_OUT = 5


class MaskCompletion:
    """Predicts missing masks: separates inside from outside by the features of a network.

    A few painted masks are enough for many images, where the features of a pretrained network already know
    the object. A logistic regression on the features of all stages, position by position, learns from the
    masks that there are.

    ```python
    completion = MaskCompletion(model).fit(annotated)  # batches of images and masks
    print(completion.iou)  # on masks that were held out
    masks = completion(images)  # for any others
    ```

    Look at what comes out before you train with it; a wrong mask guides wrongly. Where nothing in an image
    looks like an object, its mask is NaN, "no mask", rather than made up.

    Args:
        model: A pretrained classifier; the one that is to be guided, or another. It stays as it is.
        threshold: Probability from which on a pixel is inside, in (0, 1).

    Attributes:
        iou: Mean overlap of predicted and given masks that were held out, intersection over union in [0, 1];
            NaN before `fit`, or with fewer than five masks.

    Raises:
        InputError: If the threshold is out of range.
    """

    def __init__(self, model: nn.Module, *, threshold: float = 0.35) -> None:
        if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            raise InputError(f"threshold={threshold!r} must be in (0, 1).")
        self.model, self.threshold, self.iou = model, threshold, float("nan")
        self._weight: Tensor | None = None
        self._bias = torch.zeros(())
        self._names: tuple[str, ...] = ()

    def fit(self, batches: Iterable[tuple[Tensor, Any]], *, coarse: bool = False) -> MaskCompletion:
        """Learn from images with masks; those without one are left out.

        Args:
            batches: Pairs of images `(B, C, H, W)` and masks, as for
                [`SwapOutside`][attnguide.masks.SwapOutside].
            coarse: The masks hold more than the object, as boxes do: what looks like the outside is then
                taken out of them, in a few rounds, each of which learns from the last one's answers.

        Returns:
            Itself.

        Raises:
            InputError: If there is no mask at all, or images and masks do not fit.
            LayerError: If the model has no stages with rows and columns.
        """
        images, regions = _annotated(batches)
        generator = torch.Generator().manual_seed(0)
        drawn = [
            pair
            for some, masks in zip(torch.split(images, _BATCH), torch.split(regions, _BATCH), strict=True)
            for pair in self._drawn(some, masks, generator)
        ]
        held_out = torch.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
        if bool(held_out.any()):
            self._learn([pair for pair, out in zip(drawn, held_out.tolist(), strict=True) if not out], coarse)
            predicted = self(images[held_out]).nan_to_num(0.0)
            self.iou = float(_iou(predicted, regions[held_out]).mean())
        self._learn(drawn, coarse)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, within: Any = None) -> Tensor:
        """Predict a mask for each image.

        Args:
            images: `(B, C, H, W)`, prepared as for the model.
            within: Masks as for `fit`, such as boxes; nothing outside of them is part of the answer. Where
                next to nothing inside looks like an object, they are the answer themselves.

        Returns:
            `(B, H, W)` of 0 and 1; NaN everywhere where nothing was found.

        Raises:
            InputError: If it was not fitted.
        """
        if self._weight is None:
            raise InputError("this MaskCompletion has learned nothing yet: call fit first.")
        size, weight = (images.shape[-2], images.shape[-1]), self._weight.to(images.device)
        logits: Tensor = self._bias.to(images.device)
        features = self._features(images)
        # Interpolating the sums of channels is interpolating the channels.
        for feature, part in zip(features, torch.split(weight, [f.shape[1] for f in features]), strict=True):
            logits = logits + functional.resize(torch.einsum("bchw,c->bhw", feature, part), size)
        probabilities = logits.sigmoid()
        masks = (probabilities >= self.threshold).to(probabilities)
        if within is not None:
            regions, given = regions_of(within, images)
            regions = (regions >= 0.5).to(masks)
            inside = masks * regions
            some = inside.flatten(1).sum(dim=1) >= _LEAST * regions.flatten(1).sum(dim=1)
            inside = torch.where(some[:, None, None], inside, regions)
            masks = torch.where(given[:, None, None], inside, masks)
        found = masks.flatten(1).any(dim=1)
        return torch.where(found[:, None, None], masks, torch.nan)

    def _learn(self, drawn: list[tuple[Tensor, Tensor]], coarse: bool) -> None:
        features = torch.cat([feature for feature, _ in drawn])
        given = torch.cat([target for _, target in drawn])
        some = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))[:_IN_ALL]
        features, given = features[some.to(features.device)], given[some.to(given.device)]
        mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
        features = (features - mean) / deviation
        weights = _separate(features, given)
        for number in range(_ROUNDS if coarse else 0):
            # Most of what a box holds may be background, so the first answer is "inside" nearly everywhere.
            sure = 0.7 if number == 0 else 0.5
            probabilities = (features @ weights[:-1] + weights[-1]).sigmoid()
            weights = _separate(features, given * (probabilities >= sure))
        self._weight = weights[:-1] / deviation
        self._bias = weights[-1] - self._weight @ mean

    def _drawn(
        self, images: Tensor, regions: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw positions of images: features `(n, C)`, and how far each is inside, `(n,)` in [0, 1]."""
        places = torch.rand(len(images), 1, _POSITIONS, 2, generator=generator).to(regions) * 2 - 1
        read = partial(F.grid_sample, grid=places, align_corners=False, padding_mode="border")
        features = torch.cat([read(feature) for feature in self._features(images)], dim=1)
        yield from zip(features[:, :, 0].mT, read(regions[:, None])[:, 0, 0], strict=True)

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        """The features of all stages, `(B, C, h, w)`."""
        model = unwrap(self.model)
        layers = self._layers(images)
        taps = [Tap.parse(layer.name) for layer in layers]
        with outputs_of(model, taps, cloned=True) as calls, evaluating(model), muted():
            model(images)
        features = []
        for layer, tap in zip(layers, taps, strict=True):
            given = given_at(calls, tap)
            if given is None:
                raise LayerError(f"layer {layer.name!r} did not run.")
            features.append(layer.layout.spatial(given.tensor).float())
        return features

    def _layers(self, images: Tensor) -> list[Layer]:
        """The last layer of each stage."""
        model = unwrap(self.model)
        if not self._names:
            self._names = tuple(group[-1].layer.name for group in stages(list_candidates(model, images[:2])))
        return find_layers(model, images[:2], self._names)


def _annotated(batches: Iterable[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """Return the images that have a mask, and their masks `(N, H, W)`.

    Raises:
        InputError: If there are none.
    """
    images, regions = [], []
    for some, masks in batches:
        check_images(some)
        region, given = regions_of(masks, some)
        given = given & (region > 0).flatten(1).any(dim=1)
        images.append(some[given])
        regions.append(region[given])
    if not sum(map(len, images)):
        raise InputError("none of the images has a mask to learn from.")
    return torch.cat(images), torch.cat(regions)


def _separate(features: Tensor, inside: Tensor) -> Tensor:
    """Fit a logistic regression: the weight of each channel, and the constant, `(C + 1,)`."""
    weights = features.new_zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weights[:-1] + weights[-1]
        value = F.binary_cross_entropy_with_logits(logits, inside)
        value = value + _PENALTY / 2 * weights[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _iou(predicted: Tensor, given: Tensor) -> Tensor:
    both, given = predicted > 0, given >= 0.5
    return (both & given).flatten(1).sum(dim=1) / (both | given).flatten(1).sum(dim=1).clamp(min=1)
