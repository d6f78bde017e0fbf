"""A small convolutional classifier: for the demo, the tests, and the one that comes with the library."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["small_cnn"]


def small_cnn(classes: int, *, width: int = 24, channels: int = 3) -> nn.Sequential:
    """Build a plain network: four convolution blocks, global average pooling, one linear layer.

    Three poolings leave a grid of an eighth of the image: 8×8 for 64 pixels.

    Args:
        classes: Number of outputs.
        width: Channels of the first block; the last has four times as many.
        channels: Channels of the image.

    Returns:
        A module with children `block1` to `block4`, `pool`, `flatten` and `head`. It takes
        `(B, channels, H, W)` with H, W ≥ 16 and gives logits `(B, classes)`.
    """
    widths = (channels, width, 2 * width, 4 * width, 4 * width)
    blocks: list[tuple[str, nn.Module]] = []
    for depth in range(1, 5):
        layers: list[nn.Module] = [
            nn.Conv2d(widths[depth - 1], widths[depth], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[depth]),
            nn.ReLU(),
        ]
        if depth < 4:
            layers.append(nn.MaxPool2d(2))
        blocks.append((f"block{depth}", nn.Sequential(*layers)))
    head = nn.Linear(widths[-1], classes)
    return nn.Sequential(
        OrderedDict([*blocks, ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", head)])
    )
