"""Layer attention: the channel mean of a layer's features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from attnguide import functional
from attnguide.functional import may_read
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["LayerAttention"]


class LayerAttention(AttributionSource):
    """Channel mean of the features; needs no gradient, and is the same for every class of a sample.

    See [`functional.channel_mean`][attnguide.functional.channel_mean].

    A `LayerNorm` subtracts the mean over the channels, until its weights are trained. `"auto"` therefore
    means the last layer that is neither the output of a `LayerNorm`, rearranged or not, nor a sum of such; at
    a named one, rounding errors count as zero, with a warning.
    """

    needs_gradient = False
    layer = "uncentred"

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Average over channels; maps `(N, h, w)`."""
        features = trace.feature.spatial
        maps = functional.channel_mean(features)
        rounding = torch.finfo(features.dtype).eps * features.detach().float().abs().mean(dim=1)
        shown = maps.detach().abs() >= rounding
        if may_read(shown) and not bool(shown.any()):
            warnings.warn(
                "layer attention is zero everywhere: the layer normalises over its channels, and is not "
                "trained. Choose the layer before it, such as layer='blocks.10'; see `attnguide layers`.",
                stacklevel=2,
            )
        return pairs.pick(torch.where(shown, maps, 0.0))
