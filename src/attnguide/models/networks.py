"""A small convolutional classifier: that of the demo, the tests, and the embedded weights."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from attnguide.errors import InputError

__all__ = ["small_cnn"]


def small_cnn(classes: int, *, width: int = 16, channels: int = 3, reduction: int = 4) -> nn.Sequential:
    """Build a plain network: four convolution blocks, global average pooling, one linear layer.

    Args:
        classes: Number of outputs.
        width: Channels of the first block; the last has four times as many.
        channels: Channels of the image.
        reduction: Stride of the last block, 4 or 8. With 4 the receptive field of a position is 25 pixels
            wide, which localises well; with 8 it is 37 pixels, and the network recognises larger shapes.

    Returns:
        A module with children `block1` to `block4`, `pool`, `flatten` and `head`. It takes
        `(B, channels, H, W)` with H, W ≥ 16 and gives logits `(B, classes)`.

    Raises:
        InputError: If the reduction is neither 4 nor 8.
    """
    if reduction not in (4, 8):
        raise InputError(f"reduction={reduction} must be 4 or 8.")
    widths = (channels, width, 2 * width, 4 * width, 4 * width)
    # The first convolution has a stride of 2: at full resolution it would cost more than all the others.
    pooled = (2,) if reduction == 4 else (2, 3)
    blocks: list[tuple[str, nn.Module]] = []
    for depth in range(1, 5):
        stride = 2 if depth == 1 else 1
        layers: list[nn.Module] = [
            nn.Conv2d(widths[depth - 1], widths[depth], 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[depth]),
            nn.ReLU(),
        ]
        if depth in pooled:
            layers.append(nn.MaxPool2d(2))
        blocks.append((f"block{depth}", nn.Sequential(*layers)))
    head = nn.Linear(widths[-1], classes)
    return nn.Sequential(
        OrderedDict([*blocks, ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", head)])
    )
