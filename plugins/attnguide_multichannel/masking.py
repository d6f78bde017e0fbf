"""How the masks of multi-channel attention are computed: as mixtures of shared maps, or each on its own."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.errors import InputError, LayerError
from attnguide.functional import full_precision

__all__ = ["FullMasks", "Masking", "SharedMasks"]

#: Bytes of a weight while AdamW trains it: itself, its gradient, and two moments.
_TRAINED = 16


class Masking(nn.Module, ABC):
    """Computes masks from features: one for each attribute k, channel c and position p.

    Args:
        channels: Number of channels C of the features.
        classes: Number of attributes K.

    Attributes:
        channels: C.
        description: How the masks are computed, in a few words.
        channel_axes: Axes of the channels, for each weight and buffer that has them.
    """

    description: str
    channel_axes: ClassVar[Mapping[str, tuple[int, ...]]]

    factors: Tensor
    """Factors on the masks, `(K, C)`; see `attnguide_multichannel.transform`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("factors", torch.ones(classes, channels))

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Compute all masks. They are large: `B·K·C·h·w` numbers.

        Args:
            features: Features `(B, C, h, w)`.

        Returns:
            `(B, K, C, h, w)` in [0, 1] (times the factor of a transformation).

        Raises:
            LayerError: If the number of channels is wrong.
            InputError: If the masks are larger than the device's memory.
        """

    @abstractmethod
    def mean(self, features: Tensor) -> Tensor:
        """Compute the mean of the masks over the channels, `(B, K, h, w)`, without holding all of them."""

    @abstractmethod
    def attended(self, features: Tensor) -> Tensor:
        """Reduce the masked features over the positions, without holding all masks; `(B, K, C)`."""

    @abstractmethod
    def sums(self, features: Tensor) -> tuple[Tensor, ...]:
        """Compute sums over samples and positions, to be added over batches: `covariances` needs them."""

    @abstractmethod
    def covariances(self, *sums: Tensor) -> tuple[Tensor, Tensor]:
        """Compute covariances of masks, up to a common factor.

        Args:
            *sums: The results of `sums`, added over all batches.

        Returns:
            Of each two attributes over channels, positions and samples, `(K, K)`; of each two channels over
            attributes, positions and samples, `(C, C)`.
        """

    def _scaled(self, features: Tensor) -> Tensor:
        """Divide the features of each image by their root mean square: it differs much between models."""
        if features.shape[1] != self.channels:
            raise LayerError(
                f"the features have {features.shape[1]} channels, but the multi-channel attention was made "
                f"for {self.channels}. Put it on the model and layer that it was made for."
            )
        size = features.float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return features / (size + 1e-6).to(features.dtype)


class SharedMasks(Masking):
    """Masks that are mixtures of R maps: `M_kcp = Σ_r a_kcr S_rp`.

    `S` is a softmax over the positions of a 1×1 convolution of the features, `a` a softmax over the maps. So
    each mask sums to 1 over the positions, and the matrix of all masks of an image has a rank of at most R.
    Means, scores and covariances follow from `S` and `a`, without the masks.

    Args:
        channels: Number of channels C of the features.
        classes: Number of attributes K.
        maps: Number of maps R, at least 1.

    Raises:
        InputError: If there are no maps.
    """

    channel_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "places.weight": (1,),
        "deviation": (1,),
        "factors": (1,),
    }

    def __init__(self, channels: int, classes: int, maps: int = 32) -> None:
        super().__init__(channels, classes)
        if maps < 1:
            raise InputError(f"maps={maps} must be at least 1.")
        self.description = f"mixtures of {maps} shared maps"
        self.places = nn.Conv2d(channels, maps, 1)
        # The maps that an attribute attends by, and how single channels deviate.
        self.choice = nn.Parameter(torch.randn(classes, 1, maps))
        self.deviation = nn.Parameter(torch.zeros(classes, channels, maps))

    def positions(self, features: Tensor) -> Tensor:
        """Compute the maps that the masks share.

        Args:
            features: Features `(B, C, h, w)`.

        Returns:
            S, `(B, R, h, w)` in [0, 1]; each sums to 1.

        Raises:
            LayerError: If the number of channels is wrong.
        """
        logits = full_precision(self.places(self._scaled(features).to(self.places.weight.dtype)))
        return logits.flatten(2).softmax(dim=2).view_as(logits)

    @property
    def shares(self) -> Tensor:
        """The share a of each map in the mask of each attribute and channel, `(K, C, R)`.

        Sums to 1 over the maps, times the factor of a transformation.
        """
        return (self.choice + self.deviation).softmax(dim=2) * self.factors[..., None]

    def forward(self, features: Tensor) -> Tensor:
        """Compute all masks `(B, K, C, h, w)`; each sums to 1 over the positions."""
        shares = self.shares
        return torch.einsum("kcr,brhw->bkchw", shares, self.positions(features).to(shares.dtype))

    def mean(self, features: Tensor) -> Tensor:
        """Compute the mean of the masks over the channels, `(B, K, h, w)`."""
        shares = self.shares.mean(dim=1)
        return torch.einsum("kr,brhw->bkhw", shares, self.positions(features).to(shares.dtype))

    def attended(self, features: Tensor) -> Tensor:
        """Sum the masked features over the positions, `(B, K, C)`."""
        shares, maps = self.shares, self.positions(features).flatten(2)
        through = torch.bmm(full_precision(features).flatten(2).to(maps.dtype), maps.transpose(1, 2))
        return torch.einsum("bcr,kcr->bkc", through.to(shares.dtype), shares)

    def sums(self, features: Tensor) -> tuple[Tensor, ...]:
        """Compute products of each two maps, `(R, R)`: `Σ_p M_kcp M_jdp = a_kcᵀ (Σ_p S Sᵀ) a_jd`."""
        flat = self.positions(features).flatten(2)
        # Each map sums to 1, so that its mean is known.
        centered = (flat - 1 / flat.shape[2]).double()
        return (torch.einsum("brp,bqp->rq", centered, centered),)

    def covariances(self, *sums: Tensor) -> tuple[Tensor, Tensor]:
        """Compute covariances of masks, up to a factor: `(K, K)` and `(C, C)`."""
        shares = self.shares.double()
        spread = shares @ sums[0]  # (K, C, R)
        return torch.einsum("kcr,jcr->kj", spread, shares), torch.einsum("kcr,kdr->cd", spread, shares)


class FullMasks(Masking):
    """Masks that are each computed from the features: `M_kcp = σ(b_kc + Σ_d W_kcd F_dp)`.

    That is one 1×1 convolution for each attribute, and a sigmoid. A mask can be small everywhere: then the
    channel does not matter to the attribute. `F` is scaled to a root mean square of 1. At first all masks are
    close to a half, so that scores are nearly those of a linear classifier of the pooled features, and masks
    can grow as easily as shrink.

    `W` has `K·C²` weights. Training holds `B·K·C·h·w` numbers, one for each value of a mask; without
    gradients one attribute is computed after another.

    Args:
        channels: Number of channels C of the features.
        classes: Number of attributes K.
    """

    channel_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "weight": (1, 2),
        "bias": (1,),
        "factors": (1,),
    }
    description = "one for each attribute and channel"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        self.weight = nn.Parameter(torch.randn(classes, channels, channels).mul_(0.1 / channels**0.5))
        self.bias = nn.Parameter(torch.zeros(classes, channels))

    @staticmethod
    def check_fits(channels: int, classes: int, device: torch.device) -> None:
        """Refuse weights that cannot be trained on a device.

        Raises:
            InputError: If they, their gradients and the moments of AdamW exceed its memory.
        """
        count = classes * channels**2
        _check_memory(
            count * _TRAINED,
            device,
            f"the full masks of {classes} attributes and {channels} channels have {count:,} weights, and "
            "training them takes",
            "Choose a layer with fewer channels",
        )

    def forward(self, features: Tensor) -> Tensor:
        """Compute all masks `(B, K, C, h, w)`, each value in [0, 1]."""
        self._check_masks(features)
        return torch.stack(list(self._each(features)), dim=1) * self.factors[..., None, None]

    def mean(self, features: Tensor) -> Tensor:
        """Compute the mean of the masks over the channels, `(B, K, h, w)`."""
        means = [
            (mask * factors[:, None, None]).mean(dim=1)
            for mask, factors in zip(self._each(features), self.factors, strict=True)
        ]
        return torch.stack(means, dim=1)

    def attended(self, features: Tensor) -> Tensor:
        """Average the masked features over the positions, `(B, K, C)`."""
        values = full_precision(features)
        means = [(mask * values).mean(dim=(2, 3)) for mask in self._each(features)]
        return torch.stack(means, dim=1) * self.factors

    def sums(self, features: Tensor) -> tuple[Tensor, ...]:
        """Compute products of attributes `(K, K)` and channels `(C, C)`, sums `(K, C)`, and the number."""
        classes = len(self.bias)
        of_attributes = features.new_zeros(classes, classes, dtype=torch.float64)
        of_channels = features.new_zeros(self.channels, self.channels, dtype=torch.float64)
        total = features.new_zeros(classes, self.channels, dtype=torch.float64)
        for one in features[:, None]:  # the masks of a batch may not fit
            masks = self(one)[0].flatten(2).double()
            by_channel = masks.transpose(0, 1).flatten(1)
            of_attributes += masks.flatten(1) @ masks.flatten(1).T
            of_channels += by_channel @ by_channel.T
            total += masks.sum(dim=2)
        count = total.new_tensor(features.numel() // self.channels)
        return of_attributes, of_channels, total, count

    def covariances(self, *sums: Tensor) -> tuple[Tensor, Tensor]:
        """Compute covariances of masks, up to a factor: `(K, K)` and `(C, C)`."""
        attributes, channels, total, count = sums
        of_attributes, of_channels = total.sum(dim=1), total.sum(dim=0)
        return (
            attributes - torch.outer(of_attributes, of_attributes) / (count * total.shape[1]),
            channels - torch.outer(of_channels, of_channels) / (count * total.shape[0]),
        )

    def _each(self, features: Tensor) -> Iterator[Tensor]:
        """Compute the masks of one attribute after another, `(B, C, h, w)`, without factors."""
        if torch.is_grad_enabled():  # all of them are kept for the backward pass
            self._check_masks(features)
        scaled = self._scaled(features).to(self.weight.dtype)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            yield full_precision(F.conv2d(scaled, weight[:, :, None, None], bias)).sigmoid()

    def _check_masks(self, features: Tensor) -> None:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return  # sizes may be symbols
        batch, channels, height, width = features.shape
        classes = len(self.bias)
        _check_memory(
            4 * batch * classes * channels * height * width,
            features.device,
            f"the full masks of {batch} images, {classes} attributes, {channels} channels and "
            f"{height}×{width} positions take",
            "Use smaller batches, or a layer with fewer channels and positions",
        )


def _check_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Refuse what is sure to end for want of memory: on a CPU the system would kill the process."""
    memory = _memory_of(device)
    if memory is not None and needed > memory:
        raise InputError(
            f"{what} {needed / 2**30:.1f} GiB; {device} has {memory / 2**30:.1f}. "
            f"{remedy}, or masks='shared'."
        )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
