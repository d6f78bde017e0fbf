"""Small classifiers, and a batch that goes with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from attnguide.models.networks import small_cnn

CLASSES = 4


def cnn(classes: int = CLASSES, width: int = 4) -> nn.Module:
    """A CNN with batch normalisation."""
    return small_cnn(classes, width=width, reduction=8)


def smooth_cnn(classes: int = CLASSES) -> nn.Module:
    """A CNN without kinks, so that finite differences are exact."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.Softplus(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(8, 8, 1),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Tanh(),
        nn.Linear(6, classes),
    )


def tiny_vit(classes: int = CLASSES, depth: int = 2, size: int = 32, **options: Any) -> nn.Module:
    """A vision transformer with fused attention."""
    settings = {"patch_size": 8, "embed_dim": 12, "depth": depth, "num_heads": 2, **options}
    model = timm.models.VisionTransformer(img_size=size, num_classes=classes, **settings)
    with torch.no_grad():  # timm's fresh head is close to nothing
        model.head.weight.normal_(std=0.5)
    return model


class Wrapped(nn.Module):
    """A CNN whose output is packed by a function."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any], classes: int = CLASSES) -> None:
        super().__init__()
        self.body = cnn(classes)
        self.pack = pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.body(images), images)


def batch(size: int = 4, side: int = 32, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Images, class indices, and masks with a rectangle each."""
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(size, 3, side, side, generator=generator)
    labels = torch.arange(size) % classes
    masks = torch.zeros(size, side, side)
    for sample in range(size):
        top = (sample * side // 5) % (side // 2)
        masks[sample, top : top + side // 2, side // 8 : side // 2] = 1
    return images, labels, masks


def export_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    """Write a model as an ONNX file that takes any number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of old writes what the new one does, and is quicker
        settings = {"input_names": ["images"], "dynamic_axes": {"images": {0: "n"}}}
        torch.onnx.export(model, (images,), str(file), dynamo=False, **settings)
