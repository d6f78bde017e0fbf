"""The adapter: a classifier for each attribute, with a mask over all channels and positions."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.functional import full_precision, may_read
from attnguide.interfaces import Adapter
from attnguide.trace import Trace
from attnguide_multichannel.masking import FullMasks, Masking, SharedMasks

__all__ = ["Masks", "MultiChannel", "Reconstructor"]

#: Ways of computing masks.
Masks = Literal["shared", "full"]


class MultiChannel(Adapter):
    """Multi-channel attention: K binary classifiers, each with a mask of the same shape as the features.

    The k-th score is a linear function of the masked features, reduced over the positions:
    `s_k = b_k + Σ_c w_kc Σ_p F_cp · M_kcp`. Masks are computed from the features, in one of two ways:

    - `masks="shared"`: they are mixtures of R maps, and each sums to 1 over the positions; see
      [`SharedMasks`][attnguide_multichannel.masking.SharedMasks]. Cheap: training never computes all masks.
    - `masks="full"`: each attribute and channel has a mask of its own, with values in [0, 1] that are
      independent of each other; see [`FullMasks`][attnguide_multichannel.masking.FullMasks]. The score has
      the mean over the positions in place of the sum `Σ_p`. It takes `K·C²` weights, and memory for
      `B·K·C·h·w` numbers.

    Two more parts share the features while training, and add to `guide.loss`: a multi-label classifier of
    the pooled features, and a reconstructor that computes the image from them. The whole loss is the loss of
    your own loop on the scores, plus `α · BCE(multi-label) + β · MSE(reconstruction)`.

    Args:
        channels: Number of channels C of the layer's features.
        classes: Number of attributes K.
        image_channels: Number of channels of the images.
        masks: How masks are computed, `"shared"` or `"full"`.
        maps: Number of maps R that shared masks are mixtures of, by default 32.
        multi_label: Weight α, at least 0; 0 for no multi-label classifier.
        reconstruction: Weight β, at least 0; 0 for no reconstructor.
        layer: Name of the layer; by default the last one that has rows and columns.

    Attributes:
        masking: What computes the masks.

    Raises:
        InputError: If a number is too small, `masks` is unknown, or `maps` is given for full masks.

    Source: the poster "Multi-Channel Attention Mechanism" (MAM) for the components; how masks are computed,
    and the losses, are our choice, since the poster gives neither.
    """

    name = "multichannel"

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        image_channels: int = 3,
        masks: Masks = "shared",
        maps: int | None = None,
        multi_label: float = 0.5,
        reconstruction: float = 0.1,
        layer: str = "auto",
    ) -> None:
        super().__init__()
        for option, count in (("channels", channels), ("classes", classes)):
            if count < 1:
                raise InputError(f"{option}={count} must be at least 1.")
        for option, weight in (("multi_label", multi_label), ("reconstruction", reconstruction)):
            if not weight >= 0:
                raise InputError(f"{option}={weight} must be at least 0.")
        self.layer = layer
        self.multi_label, self.reconstruction = multi_label, reconstruction
        self.settings = {
            "channels": channels,
            "classes": classes,
            "image_channels": image_channels,
            "masks": masks,
            "maps": maps,
            "multi_label": multi_label,
            "reconstruction": reconstruction,
            "layer": layer,
        }
        self.masking = _masking(channels, classes, masks, maps)
        self.weight = nn.Parameter(torch.empty(classes, channels).uniform_(-1, 1) / channels**0.5)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.classifier = nn.Linear(channels, classes) if multi_label else None
        self.reconstructor = Reconstructor(channels, image_channels) if reconstruction else None

    # ------------------------------------------------------------------ masks

    def masks(self, features: Tensor) -> Tensor:
        """Compute all masks. They are large: `B·K·C·h·w` numbers.

        Args:
            features: Features `(B, C, h, w)`.

        Returns:
            `(B, K, C, h, w)` in [0, 1] (times the factor of a transformation); a shared mask sums to 1 over
            the positions.

        Raises:
            LayerError: If the number of channels is wrong.
            InputError: If full masks are larger than the device's memory.
        """
        masks: Tensor = self.masking(features)
        return masks

    def mean_masks(self, features: Tensor) -> Tensor:
        """Compute the mean of the masks over the channels, `(B, K, h, w)`, without holding all of them."""
        return self.masking.mean(features)

    # ----------------------------------------------------------------- scores

    def attended(self, features: Tensor) -> Tensor:
        """Reduce the masked features over the positions: shared masks by the sum, full ones by the mean.

        Args:
            features: Features `(B, C, h, w)`.

        Returns:
            `(B, K, C)`.
        """
        return self.masking.attended(features)

    def scores(self, attended: Tensor) -> Tensor:
        """Compute the scores of the K classifiers, `(B, K)`, from the result of `attended`."""
        return (attended.to(self.weight.dtype) * self.weight).sum(dim=2) + self.bias

    def forward(self, trace: Trace) -> Tensor:
        """Compute logits `(B, K)`, which replace the model's."""
        return self.scores(self.attended(trace.feature.spatial))

    # ------------------------------------------------------------------- loss

    def loss(self, trace: Trace, labels: Tensor, **annotations: Any) -> Tensor | None:
        """Compute the losses of the multi-label classifier and of the reconstructor.

        Args:
            trace: The forward pass.
            labels: Attributes `(B, K)`, or class indices `(B,)`.
            **annotations: Annotations; none is read.

        Raises:
            InputError: If the labels do not fit the scores.
        """
        features = trace.feature.spatial
        total: Tensor | None = None
        if self.classifier is not None:
            scores = full_precision(self.classifier(features.mean(dim=(2, 3)).to(self.weight.dtype)))
            own = F.binary_cross_entropy_with_logits(scores, _multi_hot(labels, scores))
            total = self.multi_label * own
        if self.reconstructor is not None:
            output = full_precision(self.reconstructor(features.to(self.weight.dtype), trace.image_size))
            image = F.interpolate(full_precision(trace.images), output.shape[-2:], mode="area")
            own = self.reconstruction * F.mse_loss(output, image)
            total = own if total is None else total + own
        return total


def _masking(channels: int, classes: int, masks: Masks, maps: int | None) -> Masking:
    if masks not in get_args(Masks):
        raise InputError(f"masks={masks!r} must be one of {', '.join(get_args(Masks))}.")
    if masks == "shared":
        return SharedMasks(channels, classes, 32 if maps is None else maps)
    if maps is not None:
        raise InputError(f"maps={maps} is the number of shared maps, and full masks have none; leave it out.")
    return FullMasks(channels, classes)


def _multi_hot(labels: Tensor, scores: Tensor) -> Tensor:
    """Convert labels to a number for each class, of the shape of the scores."""
    batch, classes = scores.shape
    if labels.shape == (batch,) and not labels.is_floating_point():
        if may_read(labels) and not bool(((labels >= 0) & (labels < classes)).all()):
            raise InputError(f"labels hold class indices outside of 0 to {classes - 1}.")
        labels = F.one_hot(labels.long(), classes)
    if labels.shape != scores.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}; expected ({batch}, {classes}), or ({batch},) class "
            "indices."
        )
    return labels.to(scores)


class Reconstructor(nn.Module):
    """Computes the image from the features, at up to four times their resolution.

    Args:
        channels: Number of channels C of the features.
        image_channels: Number of channels of the images.
        width: Number of channels in between.
    """

    def __init__(self, channels: int, image_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width // 2, 3, padding=1)
        self.last = nn.Conv2d(width // 2, image_channels, 3, padding=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Compute the image.

        Args:
            features: Features `(B, C, h, w)`.
            size: Size `(H, W)` of the image, which is not exceeded.

        Returns:
            `(B, image_channels, 4h, 4w)`, or as large as the image if that is smaller.
        """
        image: Tensor = self.first(features).relu()
        for layer in (self.second, self.last):
            height, width = (min(2 * side, whole) for side, whole in zip(image.shape[-2:], size, strict=True))
            image = layer(F.interpolate(image, (height, width), mode="nearest"))
            image = image.relu() if layer is self.second else image
        return image
