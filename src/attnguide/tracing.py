"""Makes a trace of what a recorder holds, and maps of a trace, and checks both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnguide.errors import AttnGuideError, GuidanceError, LayerError
from attnguide.hooks import Shard
from attnguide.interfaces import AttributionSource
from attnguide.layers import layout_of, list_candidates
from attnguide.pairs import Pairs
from attnguide.trace import Feature, Trace

__all__ = ["maps_of", "trace_of"]


def trace_of(
    model: nn.Module, shards: Sequence[Shard], layers: Sequence[str], *, differentiable: bool
) -> Trace:
    """Join the shards of a forward pass to a trace with the given layers.

    Args:
        model: The unwrapped model.
        shards: What each replica saw, in batch order.
        layers: Names of the layers wanted.
        differentiable: Whether gradients will be part of the graph.

    Raises:
        GuidanceError: If the forward did not finish.
        LayerError: If a layer did not run, or its output has no rows and columns.
    """
    logits = [shard.logits for shard in shards if shard.logits is not None]
    if len(logits) != len(shards):
        raise GuidanceError("the last forward of the model did not finish; call model(images) again.")
    device = logits[0].device
    images = torch.cat([shard.images.to(device) for shard in shards]) if len(shards) > 1 else shards[0].images
    scores = torch.cat([part.to(device) for part in logits]) if len(logits) > 1 else logits[0]
    features = {layer: _feature(model, shards, layer) for layer in layers}
    return Trace(images, scores, features, differentiable)


def maps_of(source: AttributionSource, trace: Trace, pairs: Pairs) -> Tensor:
    """Compute a source's maps `(N, h, w)`; a stranger's source may give anything.

    Raises:
        GuidanceError: If the maps are not of the size that the source tells.
    """
    maps = source(trace, pairs)
    expected = (len(pairs), *source.size(trace))
    if maps.shape != expected:
        raise GuidanceError(
            f"source {source!r} gave maps of shape {tuple(maps.shape)}, expected {expected}: one (h, w) map "
            "for each pair, of the size that its size() tells."
        )
    return maps


def _feature(model: nn.Module, shards: Sequence[Shard], layer: str) -> Feature:
    if any(layer not in shard.features for shard in shards):
        raise LayerError(
            f"layer {layer!r} did not run in the last forward of the model.{_alternatives(model, shards[0])}"
        )
    parts = tuple(shard.features[layer] for shard in shards)
    size = (shards[0].images.shape[-2], shards[0].images.shape[-1])
    layout = layout_of(parts[0].shape, size, getattr(model, "num_prefix_tokens", None))
    if layout is None:
        raise LayerError(
            f"layer {layer!r} gives a tensor of shape {tuple(parts[0].shape)}, which has no rows and "
            f"columns in the proportions of a {size[0]}×{size[1]} image.{_alternatives(model, shards[0])}"
        )
    return Feature(layer, parts, layout)


def _alternatives(model: nn.Module, shard: Shard) -> str:
    """Name layers that would do; part of an error message, so it must not raise another."""
    try:
        names = [candidate.name for candidate in list_candidates(model, shard.images) if candidate.usable]
    except (AttnGuideError, RuntimeError):
        return " Name another, or leave layer='auto'."
    return f" Layers that would do: {', '.join(names[-12:])}." if names else " Leave layer='auto'."
