"""The source: the masks of multi-channel attention as attribution maps."""

from __future__ import annotations

from torch import Tensor

from attnguide.errors import GuidanceError, LayerError
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace
from attnguide_multichannel.attention import MultiChannel

__all__ = ["MultiChannelMaps"]


class MultiChannelMaps(AttributionSource):
    """Mean over the channels of each attribute's mask, from the multi-channel attention on a model.

    The source needs no gradient, and guides the masks themselves: `Guide(…, source="multichannel", prior=…)`.
    All masks, `(B, K, C, h, w)`, are
    [`MultiChannel.masks`][attnguide_multichannel.attention.MultiChannel.masks].

    Args:
        adapter: The multi-channel attention; by default the one on the model.
    """

    needs_gradient = False

    def __init__(self, adapter: MultiChannel | None = None) -> None:
        self.adapter = adapter

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`.

        Raises:
            GuidanceError: If no multi-channel attention is on the model.
            LayerError: If the layer is not the one whose features are masked.
        """
        adapter = self._adapter(trace)
        features = trace.feature.spatial
        channels = adapter.masking.channels
        if features.shape[1] != channels:
            raise LayerError(
                f"layer {trace.feature.layer!r} has {features.shape[1]} channels; the multi-channel "
                f"attention masks {channels}. Name the same layer for both: layer={adapter.layer!r}."
            )
        return adapter.mean_masks(features)[pairs.sample, pairs.cls]

    def _adapter(self, trace: Trace) -> MultiChannel:
        if self.adapter is not None:
            return self.adapter
        for adapter in trace.adapters:
            if isinstance(adapter, MultiChannel):
                return adapter
        raise GuidanceError(
            "source 'multichannel' shows the masks of multi-channel attention, but there is none on the "
            "model. Put it on first: attnguide_multichannel.adapted.attach(model, images)."
        )
