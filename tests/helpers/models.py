"""Small classifiers, and a batch that goes with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.testing import CLASSES, batch, tiny_cnn as cnn, tiny_vit

__all__ = ["CLASSES", "Wrapped", "batch", "cnn", "smooth_cnn", "tiny_vit"]


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


class Wrapped(nn.Module):
    """A CNN whose output is packed by a function."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any], classes: int = CLASSES) -> None:
        super().__init__()
        self.body = cnn(classes)
        self.pack = pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.body(images), images)


def export_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    """Write a model as an ONNX file that takes any number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of old writes what the new one does, and is quicker
        settings = {"input_names": ["images"], "dynamic_axes": {"images": {0: "n"}}}
        torch.onnx.export(model, (images,), str(file), dynamo=False, **settings)
