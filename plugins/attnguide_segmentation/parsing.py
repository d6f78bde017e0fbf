"""The face-parsing network of Table 1: an encoder of eight convolutions, and its mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from attnguide_segmentation.regions import REGIONS

__all__ = ["ParsingNetwork", "block", "encoder", "halved", "parsing_loss"]


def block(channels: Sequence[int], kind: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> nn.Sequential:
    """Stack 3×3 convolutions, or deconvolutions, each followed by batch normalisation and PReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [
            kind(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
        ]
    return nn.Sequential(*layers)


def encoder(width: int, blocks: int = 4, channels: int = 3) -> nn.ModuleList:
    """Build blocks of two convolutions, each with twice the channels of the one before.

    Args:
        width: Number of channels of the first block; 64 in the publication.
        blocks: Number of blocks; maxima over 2×2 are taken between them.
        channels: Number of channels of the image.
    """
    widths = [width * 2**depth for depth in range(blocks)]
    inputs = [channels, *widths]
    return nn.ModuleList(
        block([inputs[depth], widths[depth], widths[depth]], nn.Conv2d) for depth in range(blocks)
    )


def halved(features: Tensor) -> Tensor:
    """Take maxima over 2×2; an odd side is rounded up, as in Table 1 (109 becomes 55)."""
    return F.max_pool2d(features, 2, ceil_mode=True)


class ParsingNetwork(nn.Module):
    """Predicts the region of each pixel of a face, at four scales.

    The encoder halves the image three times; the decoder mirrors it with nearest upsampling, and predicts
    before each of its upsamplings, and at the end.

    Args:
        width: Number of channels of the first block; 64 in the publication, with 11.7 million parameters.
        regions: Number of regions.

    Source: Kalayeh, Gong and Shah, CVPR 2017, section 3.2 and Table 1.
    """

    def __init__(self, width: int = 64, regions: int = len(REGIONS)) -> None:
        super().__init__()
        self.width, self.regions = width, regions
        self.encoder = encoder(width)
        widths = [width * 2**depth for depth in range(4)]
        self.decoder = nn.ModuleList(
            # Features from below have the channels of the block below.
            block([widths[min(depth + 1, 3)], widths[depth], widths[depth]], nn.ConvTranspose2d)
            for depth in range(4)
        )
        self.heads = nn.ModuleList(nn.ConvTranspose2d(wide, regions, 3, padding=1) for wide in widths)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute logits of the regions.

        Args:
            images: Images `(B, 3, H, W)`, of any size.

        Returns:
            Logits `(B, R, h, w)` at an eighth, a quarter, a half (rounded up), and the whole of the image's
            size.
        """
        sizes, features = [], images
        for depth, stage in enumerate(self.encoder):
            features = stage(halved(features) if depth else features)
            sizes.append((features.shape[-2], features.shape[-1]))
        scores = []
        for depth in (3, 2, 1, 0):
            if depth < 3:
                features = F.interpolate(features, size=sizes[depth], mode="nearest")
            features = self.decoder[depth](features)
            scores.append(self.heads[depth](features))
        return tuple(scores)


def parsing_loss(scores: Sequence[Tensor], labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Average the cross entropy over the scales, with equal weights.

    Args:
        scores: Logits `(B, R, h, w)` at each scale.
        labels: Indices of the regions `(B, H, W)`; taken at the nearest pixel for smaller scales. −100 is
            ignored.
        weight: Weight of each region `(R,)`; equal weights by default, as in the publication.

    Returns:
        A scalar.
    """
    losses = []
    for logits in scores:
        target = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest-exact")
        losses.append(F.cross_entropy(logits, target[:, 0].long(), weight))
    return sum(losses[1:], losses[0]) / len(losses)
