"""The publication's networks: for attributes alone, and for attributes and regions together."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from attnguide_segmentation.parsing import ParsingNetwork, block, encoder
from attnguide_segmentation.regions import REGIONS

__all__ = ["JointNetwork", "attribute_network"]


def attribute_network(
    classes: int, *, width: int = 64, channels: int = 3, blocks: nn.ModuleList | None = None
) -> nn.Sequential:
    """Build the basic network: twelve convolutions, global average pooling, one linear layer.

    Args:
        classes: Number of attributes K.
        width: Number of channels of the first block; 64 in the publication, with 24 million parameters.
        channels: Number of channels of the image.
        blocks: The first four blocks, to share them; new blocks by default.

    Returns:
        A module that takes `(B, channels, H, W)` and gives logits `(B, K)`.

    Source: Kalayeh, Gong and Shah, CVPR 2017, section 3.1.1.
    """
    first = list(encoder(width, channels=channels) if blocks is None else blocks)

    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(2, ceil_mode=True)

    return nn.Sequential(
        OrderedDict(
            block1=first[0],
            pool1=pool(),
            block2=first[1],
            pool2=pool(),
            block3=first[2],
            pool3=pool(),
            block4=first[3],
            block5=block([8 * width] * 3, nn.Conv2d),
            pool5=pool(),
            block6=block([8 * width, 16 * width, 16 * width], nn.Conv2d),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(16 * width, classes),
        )
    )


class JointNetwork(nn.Module):
    """Predicts attributes and regions; the first eight convolutions serve both.

    The two are trained together on the sum of their losses, each on its own data:
    `network.attributes(images)` and `network.parser(images)`.

    Args:
        classes: Number of attributes K.
        width: Number of channels of the first block.
        regions: Number of regions.

    Source: Kalayeh, Gong and Shah, CVPR 2017, section 4.4 and Table 4.
    """

    def __init__(self, classes: int, *, width: int = 64, regions: int = len(REGIONS)) -> None:
        super().__init__()
        self.parser = ParsingNetwork(width, regions)
        self.attributes = attribute_network(classes, width=width, blocks=self.parser.encoder)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute logits of the attributes `(B, K)`, and logits of the regions at four scales."""
        return self.attributes(images), self.parser(images)
