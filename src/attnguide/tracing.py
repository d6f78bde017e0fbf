"""Makes a trace of what a recorder holds, and maps of a trace, and checks both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from attnguide.capture.recorder import Shard
from attnguide.errors import GuidanceError, LayerError
from attnguide.layers import Attending, Layer
from attnguide.trace import Feature, Head, Trace

__all__ = ["trace_of"]


def trace_of(
    shards: Sequence[Shard],
    layers: Sequence[Layer],
    *,
    differentiable: bool,
    second_order: bool = True,
    adapters: Sequence[nn.Module] = (),
    attending: Attending | None = None,
    model: nn.Module | None = None,
) -> Trace:
    """Join the shards of a forward pass to a trace with the given layers.

    Args:
        shards: What each replica saw, in batch order.
        layers: The layers wanted.
        differentiable: Whether gradients will be part of the graph.
        second_order: Whether gradients will be differentiated in turn.
        adapters: The adapters on the model.
        attending: How the model attends, if that was recorded.
        model: The model, without a wrapper.

    Raises:
        GuidanceError: If the forward did not finish.
        LayerError: If a layer did not run, or its output is not arranged as it was when it was found.
    """
    logits = [shard.logits for shard in shards if shard.logits is not None]
    if len(logits) != len(shards):
        raise GuidanceError("the last forward of the model did not finish; call model(images) again.")
    device = logits[0].device
    images = torch.cat([shard.images.to(device) for shard in shards]) if len(shards) > 1 else shards[0].images
    scores = torch.cat([part.to(device) for part in logits]) if len(logits) > 1 else logits[0]
    features = {layer.name: _feature(shards, layer) for layer in layers}
    trace = Trace(
        images, scores, features, differentiable, second_order, adapters=tuple(adapters), model=model
    )
    if attending is None:
        return trace
    attention = tuple(tuple(shard.attended[name] for shard in shards) for name in attending.modules)
    return replace(trace, attention=attention, readers=attending.readers)


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
            f"as {layer.layout} in evaluation mode: the model treats images otherwise when it trains (it may "
            "drop patches), or it was changed since. Switch that off, or name another layer; after a change "
            "of a model in place call attnguide.layers.memory.forget()."
        )
    pooled = None
    if layer.pooled is not None and all(layer.pooled in shard.features for shard in shards):
        pooled = tuple(shard.features[layer.pooled] for shard in shards)
    head = None
    if layer.head is not None and all(f"{layer.head}:input" in shard.features for shard in shards):
        given = tuple(shard.features[f"{layer.head}:input"] for shard in shards)
        head = Head(given, shards[0].features[f"{layer.head}:weight"])
    return Feature(layer.name, parts, layer.layout, pooled, head)
