"""One forward pass: its images and logits, the features of chosen layers, and gradients that start there.

A [`Layout`][attnguide.trace.Layout] says where rows, columns and channels of a layer's output are, a
[`Layer`][attnguide.trace.Layer] names the layer, and a [`Trace`][attnguide.Trace] holds what a pass recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import ceil, floor, nan, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnguide.errors import GuidanceError, InputError, LayerError
from attnguide.functional import full_precision
from attnguide.pairs import Pairs

__all__ = [
    "Attending",
    "Feature",
    "Head",
    "How",
    "Kind",
    "Layer",
    "Layout",
    "Shard",
    "Shortcuts",
    "Trace",
    "order_index",
    "trace_of",
]

#: Arrangements of the axes of a layer's output.
Kind = Literal["nchw", "nhwc", "tokens", "nct", "windows"]
#: How a layout was determined, the most trusted first.
How = Literal["measured", "inherited", "assumed"]
#: Numbers of axes, the batch among them, that an output of each kind has.
_AXES = {"nchw": (4,), "nhwc": (4,), "tokens": (3,), "nct": (3,), "windows": (4, 5, 6)}
_CHANNELS_FIRST = ("nchw", "nct")


@dataclass(frozen=True)
class Layout:
    """How a layer's output is arranged in space.

    Attributes:
        kind: `"nchw"`; `"nhwc"`; `"tokens"`, (B, prefix + h·w + suffix, C); `"nct"`, the same with channels
            first; `"windows"`, (B, windows, positions, C) or with more axes.
        grid: Rows and columns, `(h, w)`.
        prefix: Number of tokens before the patches (class token, registers …).
        suffix: Number of tokens after them.
        order: Place of the vector of each cell of the grid, row by row, among the patches; None if they
            are row by row already.
    """

    kind: Kind
    grid: tuple[int, int]
    prefix: int = 0
    suffix: int = 0
    order: tuple[int, ...] | None = None

    @property
    def channels_first(self) -> bool:
        """Whether the channels are the axis after the batch, rather than the last."""
        return self.kind in _CHANNELS_FIRST

    @property
    def has_axes(self) -> bool:
        """Whether rows and columns are axes of the output, and so at any size of images."""
        return self.kind in ("nchw", "nhwc") and self.order is None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an output of this shape can be arranged like this."""
        if len(shape) not in _AXES[self.kind]:
            return False
        places = shape[2:] if self.kind in _CHANNELS_FIRST else shape[1:-1]
        if self.has_axes:
            return tuple(places) == self.grid
        return prod(places) == self.prefix + prod(self.grid) + self.suffix

    def flat(self, output: Tensor) -> Tensor:
        """View an output as `(B, C, h·w)`, row by row; a copy only where the order demands it."""
        first = output if self.kind in _CHANNELS_FIRST else output.movedim(-1, 1)
        places = first.flatten(2)
        if self.prefix or self.suffix:
            places = places[:, :, self.prefix : places.shape[2] - self.suffix]
        return places if self.order is None else places[:, :, order_index(self.order, output.device)]

    def spatial(self, output: Tensor) -> Tensor:
        """View an output in the model's own layout as `(B, C, h, w)`."""
        if self.has_axes:
            return output if self.kind == "nchw" else output.movedim(-1, 1)
        flat = self.flat(output)
        return flat.reshape(*flat.shape[:2], *self.grid)

    def replaced(self, output: Tensor, maps: Tensor) -> Tensor:
        """Return an output in the model's own layout with other features `(B, C, h, w)` on its grid."""
        if self.has_axes:
            return maps if self.kind == "nchw" else maps.movedim(1, -1)
        first = output if self.channels_first else output.movedim(-1, 1)
        places, patches = first.flatten(2), maps.flatten(2)
        if self.order is not None:
            patches = patches[:, :, order_index(self.order, output.device).argsort()]
        around = (places[:, :, : self.prefix], places[:, :, places.shape[2] - self.suffix :])
        whole = torch.cat([around[0], patches, around[1]], dim=2).reshape(first.shape)
        return whole if self.channels_first else whole.movedim(1, -1)

    def resized(
        self, image_size: tuple[int, int], shape: tuple[int, ...], new_size: tuple[int, int]
    ) -> Layout | None:
        """Return the layout of the same layer for images of another size; None if it cannot be determined.

        Args:
            image_size: `(H, W)` of the images that this layout is for.
            shape: Shape of the layer's output for the others.
            new_size: `(H, W)` of the others.
        """
        if self.order is not None:
            return None
        if self.kind in ("nchw", "nhwc"):
            grid = shape[2:] if self.channels_first else shape[1:-1]
            return replace(self, grid=(grid[0], grid[1])) if len(grid) == 2 else None
        count = prod(shape[2:] if self.channels_first else shape[1:-1]) - self.prefix - self.suffix
        # Patches keep their size in pixels.
        exact = [new * cells / old for old, new, cells in zip(image_size, new_size, self.grid, strict=True)]
        for height in (floor(exact[0]), ceil(exact[0])):
            for width in (floor(exact[1]), ceil(exact[1])):
                if height * width == count:
                    return replace(self, grid=(height, width))
        return None

    def __str__(self) -> str:
        notes = [
            f"{count} {name}" for name, count in (("prefix", self.prefix), ("suffix", self.suffix)) if count
        ]
        notes += [] if self.order is None else ["reordered"]
        return ", ".join([f"{self.kind} {self.grid[0]}×{self.grid[1]}", *notes])


@lru_cache(maxsize=64)
def order_index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the order of patches as an index on a device; made once."""
    return torch.tensor(order, device=device)


@dataclass(frozen=True)
class Shortcuts:
    """Measured properties of what follows a layer that make its gradients cheaper.

    Attributes:
        pooled: Name of the tensor that holds the spatial mean of the layer's output, if the logits depend on
            nothing else; gradients are taken there.
        head: Name of the linear layer whose output is the logits, if there is one: gradients start from its
            weights.
        rowwise: Names of later modules that transform each token separately and whose patches the logits do
            not depend on: the patches need no graph.
        queries: Names of later attention modules in which only the queries of the first tokens affect the
            logits.
    """

    pooled: str | None = None
    head: str | None = None
    rowwise: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer whose output has rows and columns.

    Attributes:
        name: Name of the module, or of a tensor of it; see [`find_layers`][attnguide.layers.find_layers].
        layout: Where rows, columns and channels of its output are.
        how: `"measured"`: perturbed images show the layout; `"inherited"`: measured at another layer of the
            same shape, or for images of another size; `"assumed"`: from the shape and the model's metadata.
        agreement: Correlation of the measured positions with those of the layout, at most 1; NaN if not
            measured.
        spread: Share of the positions that carry a gradient of the logits, 0 to 1; NaN if the layer runs
            without a graph.
        shortcuts: What makes its gradients cheaper.
    """

    name: str
    layout: Layout
    how: How
    agreement: float
    spread: float
    shortcuts: Shortcuts = Shortcuts()

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as JSON values, so that other processes look at the same one without measuring.

        ```python
        (layer,) = ag.layers.find_layers(model, images)
        text = json.dumps(layer.to_dict())
        ag.explain(model, images, layer=Layer.from_dict(json.loads(text)))
        ```
        """
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        # JSON has no NaN.
        return {key: None if value != value else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layer:
        """Make a layer of the values that `to_dict` made of it.

        Raises:
            InputError: If they are not a layer.
        """
        try:
            return _layer_of(values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{values!r:.80} is not a layer as Layer.to_dict writes it ({error}). Measure it again: "
                "attnguide.layers.find_layers."
            ) from error

    def plain(self) -> Layer:
        """Return the layer without shortcuts, for logits that do not come from the model's own head."""
        return replace(self, shortcuts=Shortcuts())

    @property
    def class_token(self) -> dict[str, tuple[int, bool]]:
        """Modules of which only the first tokens matter: their number, and whether it is attention."""
        prefix, shortcuts = self.layout.prefix, self.shortcuts
        return {
            name: (prefix, name in shortcuts.queries) for name in (*shortcuts.rowwise, *shortcuts.queries)
        }

    @property
    def tokens(self) -> int:
        """Number of tokens of a transformer's layer.

        Raises:
            LayerError: If the layer is not a transformer's.
        """
        if self.layout.kind != "tokens":
            raise LayerError(
                f"layer {self.name!r} gives {self.layout}: attention sources need a transformer whose "
                "patches are tokens. Choose a source of another kind, such as grad_cam."
            )
        return self.layout.prefix + prod(self.layout.grid) + self.layout.suffix

    @property
    def watched(self) -> list[str]:
        """Names of the other tensors that its shortcuts need recorded."""
        pooled, head = self.shortcuts.pooled, self.shortcuts.head
        return [name for name in (pooled, head and f"{head}:input") if name]

    def __str__(self) -> str:
        return f"{self.name} ({self.layout}, {self.how})"


def _layer_of(values: Mapping[str, Any]) -> Layer:
    """Make a layer of JSON values; raises `TypeError`, `ValueError` and others if they are none."""
    layout, shortcuts = values["layout"], values["shortcuts"]
    order = layout["order"]
    numbers = {key: nan if values[key] is None else float(values[key]) for key in ("agreement", "spread")}
    height, width = map(int, layout["grid"])
    if layout["kind"] not in _AXES or not isinstance(values["name"], str):
        raise ValueError(f"kind {layout['kind']!r}, name {values['name']!r}")
    return Layer(
        **{
            **values,
            **numbers,
            "layout": Layout(
                **{**layout, "grid": (height, width), "order": None if order is None else tuple(order)}
            ),
            "shortcuts": Shortcuts(
                **{**shortcuts, **{name: tuple(shortcuts[name]) for name in ("rowwise", "queries")}}
            ),
        }
    )


@dataclass
class Shard:
    """The recording of one replica of the model in its last forward; under `DataParallel` one per device.

    Attributes:
        images: The images, `(b, C, H, W)`.
        features: Outputs of the recorded layers and other recorded tensors, by name.
        logits: `(b, K)`; None until the forward has finished.
        attended: Attention probabilities by module, `(b, heads, N, N)`.
    """

    images: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    attended: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Attending:
    """How a transformer attends.

    Attributes:
        modules: Names of the modules that attend among all tokens, in the order in which they run.
        readers: The tokens that the logits are computed from: the class token, or all patches.
    """

    modules: tuple[str, ...]
    readers: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """The linear layer that gives the logits: its weights are the gradients of the logits.

    Attributes:
        inputs: Its input, `(B, D)`, one tensor for each device.
        weight: `(K, D)`.
    """

    inputs: tuple[Tensor, ...]
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
        images: The input of the model, `(B, C, H, W)`.
        logits: `(B, K)`, attached to the graph.
        features: The recorded layers by name, in the requested order.
        differentiable: Whether gradients computed here are part of the graph themselves (training), or end
            here (explaining).
        adapters: The adapters on the model.
        attention: Probabilities of each attention among all patches, in the order in which they run,
            `(B, heads, N, N)`, one tensor for each device; for sources that read them.
        readers: The tokens that the logits are computed from: the class token, or all patches.
        model: The model without a wrapper, for sources that run it again.
        output: Which part of its output is the logits, as in [`explain`][attnguide.explain]; None if that is
            plain.
    """

    images: Tensor
    logits: Tensor
    features: Mapping[str, Feature]
    differentiable: bool = False
    adapters: tuple[nn.Module, ...] = ()
    attention: tuple[tuple[Tensor, ...], ...] = ()
    readers: tuple[int, ...] = ()
    model: nn.Module | None = None
    output: str | int | Callable[[Any], Tensor] | None = None

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
        return pairs.pick(means[0]) if len(means) == 1 else _by_pair(means, pairs, feature)

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
        self._check_softmax()
        with torch.set_grad_enabled(self.differentiable):
            # Of Σ ln p = Σ z − K·ln Σ exp z with respect to the logits z.
            slopes = 1 - self.logits.shape[1] * self.logits.softmax(dim=1)
        found = self._grad(self.logits, feature.parts, feature, slopes)
        return feature.layout.spatial(_joined(found))

    def log_gradients(self, pairs: Pairs, feature: Feature | None = None) -> Tensor:
        """Gradient of ln p of each pair's class, of a softmax over all classes, with respect to a feature.

        That of the cross entropy, negated.

        Args:
            pairs: N pairs.
            feature: The feature; the trace's only one if left out.

        Returns:
            `(N, C, h, w)`, part of the graph if the trace is differentiable.

        Raises:
            GuidanceError: As for [`gradients_of_all`][attnguide.trace.Trace.gradients_of_all].
        """
        feature = feature or self.feature
        self._check_softmax()
        passes = []
        for slot in range(pairs.slots):
            here = (pairs.slot == slot).nonzero()[:, 0]
            sample, cls = pairs.sample[here], pairs.cls[here]
            with torch.set_grad_enabled(self.differentiable):
                # Of z_c − ln Σ exp z with respect to the logits z.
                own = torch.zeros_like(self.logits).index_put((sample, cls), self.logits.new_ones(()))
                slopes = own - self.logits.softmax(dim=1)
                sign = self.logits.new_zeros(len(self.logits), 1).index_put(
                    (sample,), pairs.sign[here, None].to(self.logits)
                )
            found = self._grad(self.logits, feature.parts, feature, slopes * sign)
            passes.append(feature.layout.spatial(_joined(found)))
        return _by_pair(passes, pairs, feature)

    def _check_softmax(self) -> None:
        if self.logits.shape[1] < 2:
            raise GuidanceError(
                "log-probabilities are those of a softmax over at least two classes, and the model has one "
                "logit. Use score='logit'."
            )

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
        places = feature.parts if feature.pooled is None else feature.pooled
        head = feature.head
        start = self.logits if head is None else _joined(head.inputs)
        with torch.set_grad_enabled(self.differentiable):
            # The gradient of the scores with respect to the start.
            slopes = start.new_zeros(pairs.slots, *start.shape)
            sign = pairs.sign.to(start.dtype)
            if head is None:
                slopes[pairs.slot, pairs.sample, pairs.cls] = sign
            else:
                rows = head.weight.to(device=start.device, dtype=start.dtype)[pairs.cls]
                slopes[pairs.slot, pairs.sample] = rows * sign[:, None]
        if feature.pooled is not None and pairs.slots > 1:
            # Behind the pooling a pass costs next to nothing, but launching it does.
            found = self._grad(start, places, feature, slopes, batched=True)
            return list(torch.cat([part.to(places[0].device) for part in found], dim=1))
        return [_joined(self._grad(start, places, feature, slope)) for slope in slopes]

    def _grad(
        self,
        start: Tensor,
        places: tuple[Tensor, ...],
        feature: Feature,
        slopes: Tensor,
        *,
        batched: bool = False,
    ) -> tuple[Tensor, ...]:
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
                "itself switches gradients off for a part of its forward. Choose a layer that runs after it; "
                "if the model checkpoints activations, use use_reentrant=False; to freeze a part, call "
                "part.requires_grad_(False)."
            )
        if len(places) == 1 and start is places[0]:
            return (slopes,)
        try:
            found = torch.autograd.grad(
                start,
                places,
                grad_outputs=slopes,
                is_grads_batched=batched,
                create_graph=self.differentiable,
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "checkpoint" in str(error):
                raise GuidanceError(
                    "the model checkpoints activations in the old way, which knows no gradients but those of "
                    "weights. Use checkpoint(…, use_reentrant=False), or switch it off."
                ) from error
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


def _by_pair(passes: list[Tensor], pairs: Pairs, feature: Feature) -> Tensor:
    """Pick each pair's own from gradients with a batch axis."""
    if not passes:
        return feature.spatial[:0]
    return pairs.pick(passes[0]) if len(passes) == 1 else torch.stack(passes)[pairs.slot, pairs.sample]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


def trace_of(
    shards: Sequence[Shard],
    layers: Sequence[Layer],
    *,
    differentiable: bool,
    adapters: tuple[nn.Module, ...] = (),
    attending: Attending | None = None,
    model: nn.Module | None = None,
    output: str | int | Callable[[Any], Tensor] | None = None,
) -> Trace:
    """Join the shards of a forward pass into a trace of the given layers.

    Args:
        shards: One for each replica, in batch order.
        layers: The layers.
        differentiable: Whether gradients are to be part of the graph.
        adapters: The adapters on the model.
        attending: How the model attends, if its attention was recorded.
        model: The model, without a wrapper.
        output: Which part of its output is the logits.

    Raises:
        GuidanceError: If the forward did not finish.
        LayerError: If a layer did not run, or its output has another layout than when it was found.
    """
    logits = [shard.logits for shard in shards if shard.logits is not None]
    if len(logits) != len(shards):
        raise GuidanceError("the last forward of the model did not finish; call model(images) again.")
    attention: tuple[tuple[Tensor, ...], ...] = ()
    if attending is not None:
        attention = tuple(tuple(shard.attended[name] for shard in shards) for name in attending.modules)
    return Trace(
        _joined(tuple(shard.images for shard in shards)),
        _joined(tuple(logits)),
        {layer.name: _feature(shards, layer) for layer in layers},
        differentiable,
        adapters,
        attention,
        () if attending is None else attending.readers,
        model,
        output,
    )


def _feature(shards: Sequence[Shard], layer: Layer) -> Feature:
    if any(layer.name not in shard.features for shard in shards):
        raise LayerError(
            f"layer {layer.name!r} did not run in the last forward of the model. Name one that always runs, "
            "or leave layer='auto'."
        )
    parts = tuple(shard.features[layer.name] for shard in shards)
    if not layer.layout.fits(tuple(parts[0].shape)):
        raise LayerError(
            f"layer {layer.name!r} gave a tensor of shape {tuple(parts[0].shape)}, although it is arranged "
            f"as {layer.layout} in evaluation mode: the model processes images differently in training (it "
            "may drop patches), or it was changed since. Switch that off, or name another layer; after a "
            "change of a model in place call attnguide.layers.forget()."
        )
    shortcuts, pooled, head = layer.shortcuts, None, None
    if shortcuts.pooled is not None and all(shortcuts.pooled in shard.features for shard in shards):
        pooled = tuple(shard.features[shortcuts.pooled] for shard in shards)
    if shortcuts.head is not None and all(f"{shortcuts.head}:input" in shard.features for shard in shards):
        inputs = tuple(shard.features[f"{shortcuts.head}:input"] for shard in shards)
        head = Head(inputs, shards[0].features[f"{shortcuts.head}:weight"])
    return Feature(layer.name, parts, layer.layout, pooled, head)
