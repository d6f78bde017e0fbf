"""Samples, masks and a quick fine-tuning for the tests of fine-tuning."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.helpers.models import cnn
from torch import Tensor, nn
from torchvision.transforms import v2

from attnguide_gradcam_iou.finetune import finetune

CLASSES = 4


SIZE = 32


quick = partial(finetune, epochs=1, learning_rate=0.002)


def corner() -> Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[:16, :16] = 1
    return mask


def template() -> Tensor:
    """A region for class 1, and none for the others."""
    masks = torch.full((CLASSES, SIZE, SIZE), torch.nan)
    masks[1] = corner()
    return masks


def samples(count: int = 16, masks: bool = False) -> list[tuple[Tensor, ...]]:
    """Images whose attribute k is present where colour k % 3 is strong in the top left corner."""
    generator = torch.Generator().manual_seed(0)
    attributes = (torch.rand(count, CLASSES, generator=generator) < 0.5).float()
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator) * 0.5
    images[:, :, :16, :16] += 0.5 * attributes[:, :3, None, None]
    parts = [images, attributes, corner().expand(count, -1, -1)]
    return list(zip(*parts[: 3 if masks else 2], strict=True))


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def cnn_without_randomness() -> nn.Module:
    torch.manual_seed(3)
    return cnn()


def paint(path: Path, mask: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save(path)


TO_TENSOR = v2.Compose([v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
