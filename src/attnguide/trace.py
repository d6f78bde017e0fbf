"""What one forward pass left behind: images, logits, and the features of the layers asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attnguide.errors import GuidanceError, LayerError
from attnguide.functional import full_precision
from attnguide.layers.layout import Layout
from attnguide.pairs import Pairs

__all__ = ["Feature", "Head", "Trace"]


@dataclass(frozen=True)
class Head:
    """The linear layer that gives the logits: its weights are the gradients of the logits.

    Attributes:
        given: What it was given, `(B, D)`, one tensor for each device.
        weight: `(K, D)`.
    """

    given: tuple[Tensor, ...]
    weight: Tensor


@dataclass(frozen=True)
class Feature:
    """The output of one layer, still attached to the graph.

    Attributes:
        layer: Name of the layer; see [`find_layers`][attnguide.layers.find_layers].
        parts: The output as the model gave it: one tensor, or one for each device under `DataParallel`, in
            batch order.
        layout: Where rows, columns and channels are.
        pooled: The mean over the positions, one tensor for each device, if the logits depend on the output
            through it alone; gradients are then taken there, which is cheap.
        head: The linear layer that gives the logits, if there is one; gradients start from its weights.
    """

    layer: str
    parts: tuple[Tensor, ...]
    layout: Layout
    pooled: tuple[Tensor, ...] | None = None
    head: Head | None = None

    @property
    def spatial(self) -> Tensor:
        """The feature as `(B, C, h, w)`; a view of the model's own tensor, on the first part's device."""
        return self.layout.spatial(_joined(self.parts))

    @property
    def flat(self) -> Tensor:
        """The feature as `(B, C, h·w)`; a view where the model's own layout allows."""
        return self.layout.flat(_joined(self.parts))


@dataclass(frozen=True)
class Trace:
    """One forward pass, as an attribution source or a target prior sees it.

    Attributes:
        images: What the model was given, `(B, C, H, W)`.
        logits: What it answered, `(B, K)`, attached to the graph.
        features: The captured layers by name, in the order asked for.
        differentiable: Whether gradients computed here are part of the graph themselves (training), or end
            here (explaining).
        second_order: Whether gradients computed here are differentiated in turn when training. Otherwise
            they are constants, and only the features carry the guidance.
        adapters: The adapters that guides hold on the model.
        attention: What each attention among all patches attends to, in the order in which they run,
            `(B, heads, N, N)`, one tensor for each device; for sources that read it.
        readers: The tokens that the answer is read from: the class token, or all patches.
        model: The model without a wrapper, for sources that run it again.
    """

    images: Tensor
    logits: Tensor
    features: Mapping[str, Feature]
    differentiable: bool = False
    second_order: bool = True
    adapters: tuple[nn.Module, ...] = ()
    attention: tuple[tuple[Tensor, ...], ...] = ()
    readers: tuple[int, ...] = ()
    model: nn.Module | None = None

    def at(self, *layers: str) -> Trace:
        """Return the same pass with only the named layers."""
        return replace(self, features={name: self.features[name] for name in layers})

    @property
    def feature(self) -> Feature:
        """The captured layer, where there is exactly one.

        Raises:
            LayerError: If there are several layers, or none.
        """
        if len(self.features) != 1:
            raise LayerError(f"this part reads one layer, but the trace has {list(self.features)}.")
        return next(iter(self.features.values()))

    @property
    def attended(self) -> list[Tensor]:
        """What each attention attends to, `(B, heads, N, N)`, on the first part's device."""
        return [_joined(parts) for parts in self.attention]

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of the images, `(H, W)`."""
        return self.images.shape[-2], self.images.shape[-1]

    def scores(self, pairs: Pairs) -> Tensor:
        """Evidence of each pair, `(N,)`: its logit, times the pair's sign."""
        return self.logits[pairs.sample, pairs.cls] * pairs.sign

    def gradients(self, pairs: Pairs, feature: Feature | None = None) -> Tensor:
        """Gradient of each pair's score with respect to a feature.

        Autograd starts at the feature: whatever lies before it is not touched. All samples share a pass, so
        that there are as many passes through the tail as one sample has classes; if the tail begins with the
        mean over all positions, they start behind it, in one batch. (Batch normalisation in training mode
        *after* the feature couples samples; the coupling is part of the result, as in every CAM
        implementation.)

        Args:
            pairs: N pairs.
            feature: The feature; the trace's only one if left out.

        Returns:
            `(N, C, h, w)`, part of the graph if the trace is differentiable.

        Raises:
            GuidanceError: If the logits have no graph, or do not depend on the feature.
        """
        feature = feature or self.feature
        if feature.pooled is not None:
            means = self.mean_gradients(pairs, feature)
            return means[:, :, None, None].expand(*means.shape, *feature.layout.grid)
        return _by_pair([feature.layout.spatial(one) for one in self._passes(pairs, feature)], pairs, feature)

    def mean_gradients(self, pairs: Pairs, feature: Feature | None = None) -> Tensor:
        """Gradient of each pair's score with respect to a feature, averaged over the positions.

        The channel weights of Grad-CAM, without the memory that whole gradients take; see
        [`gradients`][attnguide.trace.Trace.gradients].

        Args:
            pairs: N pairs.
            feature: The feature; the trace's only one if left out.

        Returns:
            `(N, C)`, part of the graph if the trace is differentiable.

        Raises:
            GuidanceError: If the logits have no graph, or do not depend on the feature.
        """
        feature = feature or self.feature
        passes = self._passes(pairs, feature)
        if feature.pooled is None:
            means = [full_precision(feature.layout.flat(one)).mean(dim=2) for one in passes]
        else:
            positions = feature.layout.grid[0] * feature.layout.grid[1]
            means = [full_precision(one).flatten(1) / positions for one in passes]
        return _by_pair(means, pairs, feature)

    def gradients_of_all(self, feature: Feature | None = None) -> Tensor:
        """Gradient of Σ ln p, over all classes of a softmax, with respect to a feature: one pass.

        Args:
            feature: The feature; the trace's only one if left out.

        Returns:
            `(B, C, h, w)`, part of the graph if the trace is differentiable.

        Raises:
            GuidanceError: If the logits have no graph, or do not depend on the feature.
        """
        feature = feature or self.feature
        self._check_graph(feature)
        if self.logits.shape[1] < 2:
            raise GuidanceError(
                "log-probabilities are those of a softmax over at least two classes, and the model has one "
                "logit. Use score='logit'."
            )
        with torch.set_grad_enabled(self.differentiable and self.second_order):
            # Of Σ ln p = Σ z − K·ln Σ exp z with respect to the logits z.
            slopes = 1 - self.logits.shape[1] * self.logits.softmax(dim=1)
        found = self._grad(self.logits, feature.parts, feature, slopes)
        return feature.layout.spatial(_joined(found))

    def attention_gradients(self, pairs: Pairs) -> list[Tensor]:
        """Gradient of one score of each sample with respect to what all attention attends to.

        Args:
            pairs: At most one pair of each sample.

        Returns:
            For each attention `(B, heads, N, N)`, zeros for samples without a pair; part of the graph if the
            trace is differentiable.

        Raises:
            GuidanceError: If the logits have no graph.
        """
        self._check_graph(self.feature)
        slopes = torch.zeros_like(self.logits)
        slopes[pairs.sample, pairs.cls] = pairs.sign.to(slopes.dtype)
        places = tuple(part for parts in self.attention for part in parts)
        found = iter(self._grad(self.logits, places, self.feature, slopes))
        return [_joined(tuple(next(found) for _ in parts)) for parts in self.attention]

    def weigh(self, pairs: Pairs, weights: Tensor, feature: Feature | None = None) -> Tensor:
        """Sum a feature over its channels, weighted for each pair.

        Args:
            pairs: N pairs.
            weights: `(N, C)`.
            feature: The feature; the trace's only one if left out.

        Returns:
            Maps `(N, h, w)`, signed.
        """
        feature = feature or self.feature
        flat = full_precision(feature.flat)
        if pairs.each:
            return torch.bmm(weights[:, None], flat.to(weights.dtype)).view(-1, *feature.layout.grid)
        # One product for all classes of a sample, so that features are not copied for each of them.
        dense = weights.new_zeros(len(flat), pairs.slots, flat.shape[1])
        dense[pairs.sample, pairs.slot] = weights
        maps = torch.bmm(dense, flat.to(dense.dtype))
        return maps[pairs.sample, pairs.slot].view(-1, *feature.layout.grid)

    def _passes(self, pairs: Pairs, feature: Feature) -> list[Tensor]:
        """Gradients slot by slot, each with a batch axis, in the layout of the model, or pooled."""
        self._check_graph(feature)
        places = feature.parts if feature.pooled is None else feature.pooled
        start, slopes = self._starts(pairs, feature)
        if feature.pooled is not None and pairs.slots > 1:
            # Behind the pooling a pass costs next to nothing, but launching it does.
            found = self._grad(start, places, feature, slopes, batched=True)
            return list(torch.cat([part.to(places[0].device) for part in found], dim=1))
        return [_joined(self._grad(start, places, feature, slope)) for slope in slopes]

    def _starts(self, pairs: Pairs, feature: Feature) -> tuple[Tensor, Tensor]:
        """Where differentiation starts, `(B, D)`, and the gradient of the scores there, `(slots, B, D)`."""
        head = feature.head
        start = self.logits if head is None else _joined(head.given)
        with torch.set_grad_enabled(self.differentiable and self.second_order):
            slopes = start.new_zeros(pairs.slots, *start.shape)
            sign = pairs.sign.to(start.dtype)
            if head is None:
                slopes[pairs.slot, pairs.sample, pairs.cls] = sign
            else:
                rows = head.weight.to(device=start.device, dtype=start.dtype)[pairs.cls]
                slopes[pairs.slot, pairs.sample] = rows * sign[:, None]
        return start, slopes

    def _grad(
        self,
        start: Tensor,
        places: tuple[Tensor, ...],
        feature: Feature,
        slopes: Tensor,
        *,
        batched: bool = False,
    ) -> tuple[Tensor, ...]:
        if len(places) == 1 and start is places[0]:
            return (slopes,)
        try:
            found = torch.autograd.grad(
                start,
                places,
                grad_outputs=slopes,
                is_grads_batched=batched,
                create_graph=self.differentiable and self.second_order,
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise GuidanceError(
                "the graph of the last forward was freed by a backward pass. Call guide.loss before "
                "backward(), and go backward once, from the sum of the losses."
            ) from error
        if any(part is None for part in found):
            raise GuidanceError(
                f"the logits do not depend on layer {feature.layer!r}. Choose a layer that the output "
                "is computed from."
            )
        return found

    def _check_graph(self, feature: Feature) -> None:
        if not self.logits.requires_grad:
            raise GuidanceError(
                "the logits have no graph: the model ran under torch.no_grad() or inference_mode(), or no "
                "parameter requires a gradient. Run the forward with gradients enabled."
            )
        if not all(part.is_floating_point() for part in feature.parts):
            raise GuidanceError(
                f"layer {feature.layer!r} holds integers, which have no gradient. Give the model images as "
                "floats, or look at a layer behind the one that makes them floats."
            )
        if not all(part.requires_grad for part in feature.parts):
            raise GuidanceError(
                f"layer {feature.layer!r} ran without a graph, although the logits have one: the model "
                "itself switches gradients off for a part of its forward. Choose a layer that runs after "
                "it."
            )


def _by_pair(passes: list[Tensor], pairs: Pairs, feature: Feature) -> Tensor:
    """Pick each pair's own from gradients with a batch axis."""
    if not passes:
        return feature.spatial[:0]
    return pairs.pick(passes[0]) if len(passes) == 1 else torch.stack(passes)[pairs.slot, pairs.sample]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
