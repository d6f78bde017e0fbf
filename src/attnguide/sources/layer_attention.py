"""Layer attention: the channel mean of a layer's features."""

from __future__ import annotations

from torch import Tensor

from attnguide import functional
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["LayerAttention"]


class LayerAttention(AttributionSource):
    """Channel mean of the features; needs no gradient, and is the same for every class of a sample.

    See [`functional.channel_mean`][attnguide.functional.channel_mean].
    """

    needs_gradient = False

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Average over channels; maps `(N, h, w)`."""
        return pairs.pick(functional.channel_mean(trace.feature.spatial))
