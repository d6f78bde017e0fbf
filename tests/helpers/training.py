"""A small data set with few masks, and the loop written by hand that trainers are compared with."""

from __future__ import annotations

import torch
from tests.helpers.models import CLASSES, batch, smooth_cnn
from torch import Tensor, nn
from torch.utils.data import Dataset

import attnguide as ag

STEPS, LR, WEIGHT = 20, 0.02, 1.0


class Sparse(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images, labels and masks, every third of which is missing, and more in the first half."""

    def __init__(self, size: int = 48) -> None:
        self.images, self.labels, self.masks = batch(size)
        self.images, self.masks = self.images.double(), self.masks.double()
        self.masks[::3] = torch.nan
        self.masks[: size // 2 : 2] = torch.nan

    def part(self, order: Tensor) -> Sparse:
        """Some of the samples, in an order."""
        part = Sparse(2)
        part.images, part.labels, part.masks = self.images[order], self.labels[order], self.masks[order]
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], self.labels[index], self.masks[index]


def network() -> nn.Module:
    """A network without batch normalization, so that parts of a batch are those of the whole."""
    torch.manual_seed(0)
    return smooth_cnn(CLASSES).double()


def terms() -> list[ag.Term]:
    return [ag.Term(loss="energy", weight=WEIGHT, warmup=8)]


def plain_loop(size: int, steps: int = STEPS, every: int = 1, model: nn.Module | None = None) -> nn.Module:
    """Train with plain SGD on joint batches, going over the data in order again and again.

    Args:
        size: Size of the joint batch: of all processes and accumulated batches together.
        steps: Number of steps of the optimizer.
        every: Number of accumulated batches, which count as steps of the warm-up.
        model: A network that gives logits; by default a small one.
    """
    data, model = Sparse(), network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with ag.Guide(model, terms=terms()) as guide:
        order = torch.arange(len(data)).repeat(-(-steps * size // len(data)))
        for step in range(steps):
            indices = order[step * size : (step + 1) * size]
            annotated = float((~data.masks[indices].isnan().all(dim=(1, 2))).sum())
            for part in indices.chunk(every):
                images, labels, masks = (values[part] for values in (data.images, data.labels, data.masks))
                loss = nn.functional.cross_entropy(model(images), labels) / every
                guidance = guide.loss(labels, mask=masks, normalize_by=annotated if every > 1 else None)
                (loss + guidance).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def plain_exchanging(
    size: int,
    steps: int = STEPS,
    every: int = 1,
    model: nn.Module | None = None,
    data: Sparse | None = None,
) -> nn.Module:
    """Train as `plain_loop` does, by exchanging what is outside of the masks."""
    data, model = Sparse() if data is None else data, network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    intervention = ag.Intervention.from_recipe(model)
    order = torch.arange(len(data)).repeat(-(-steps * size // len(data)))
    for step in range(steps):
        for part in order[step * size : (step + 1) * size].chunk(every):
            both = intervention(data.images[part], data.labels[part], mask=data.masks[part])
            loss = nn.functional.cross_entropy(both.swapped, data.labels[part]) + both.loss
            (loss / every).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same_weights(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (one - other).abs().max().item() <= tolerance, name
