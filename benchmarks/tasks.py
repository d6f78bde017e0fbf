"""What the benchmark of effect trains on: data with a shortcut, a network, and a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.data.decoy import DecoyMNIST, Protocol
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.models.networks import small_cnn

PAIR = ("lipstick", "heavy_makeup")


@dataclass(frozen=True)
class Part:
    """Images with labels, where to look, and groups among which accuracy is compared (None: one group).

    Attributes:
        images: `(N, C, H, W)`, as the network takes them.
        labels: `(N,)`.
        masks: Masks of where to look, `(N, H, W)`.
        groups: `(N,)`, from 0.
        annotated: 1 for images that have a mask, `(N,)`; None if all have.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    groups: Tensor | None = None
    annotated: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> Part:
        groups, annotated = (None if each is None else each[index] for each in (self.groups, self.annotated))
        return Part(self.images[index], self.labels[index], self.masks[index], groups, annotated)


@dataclass(frozen=True)
class Task:
    """A data set with a shortcut, and how a network is trained on it.

    Attributes:
        about: Description for the tables.
        parts: Gives training, validation (of the training's distribution) and test data for a seed, and
            whether little will do.
        network: Makes the network.
        epochs: Passes over the training data.
        batch: Images in a step.
        optimizer: Makes the optimiser.
        held_out: Number of validation images.
        published: Accuracies that others report, in per cent.
        decay: Whether the learning rate falls to a twentieth, epoch by epoch.
        weights_of: The task whose λ are taken; None to choose them here.
    """

    about: str
    parts: Callable[[Path, int, bool], tuple[Part, Part, Part]]
    network: Callable[[], nn.Module]
    epochs: int
    batch: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    held_out: int
    published: dict[str, str]
    decay: bool = False
    weights_of: str | None = None


def digits_network() -> nn.Module:
    """The network of both protocols: conv20-5, pool, conv50-5, pool, fc256, fc10."""
    convolutions: list[nn.Module] = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10))


def digits(protocol: Protocol, data: Path, seed: int, quick: bool) -> tuple[Part, Part, Part]:
    """5,000 of the 60,000 training images are for validation."""
    train = DecoyMNIST(data, "train", protocol=protocol, seed=seed)
    test = DecoyMNIST(data, "test", protocol=protocol, seed=seed + 1000)
    whole = Part(train.images, train.labels, train.masks)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    valid, end = (300, 900) if quick else (5000, len(whole))
    tested = torch.arange(min(len(test), 300 if quick else len(test)))
    return (
        whole.select(order[valid:end]),
        whole.select(order[:valid]),
        Part(test.images, test.labels, test.masks).select(tested),
    )


def faces(data: Path, seed: int, quick: bool) -> tuple[Part, Part, Part]:
    """Lipstick, with make-up of the eyes on 98 % of the faces; in the test they are independent."""

    def drawn(count: int, number: int, together: float) -> Part:
        whole = ProceduralFaces(
            count,
            seed=3 * seed + number,
            cooccurrence={("lipstick", "heavy_makeup"): together},
            prevalence={"lipstick": 0.5, "heavy_makeup": 0.5},
        ).stack()
        lipstick, makeup = (whole.attributes[:, ATTRIBUTES.index(name)].long() for name in PAIR)
        images = (whole.image.as_subclass(Tensor) - 0.5) / 0.25
        mask = template("lipstick", images.shape[-1]).expand(count, -1, -1)
        return Part(images, lipstick, mask, 2 * lipstick + makeup)

    train, some = (128, 64) if quick else (2400, 600)
    return drawn(train, 0, 0.98), drawn(some, 1, 0.98), drawn(some if quick else 1200, 2, 0.5)


def _annotated(share: float, part: Part, generator: torch.Generator) -> Part:
    chosen = torch.randperm(len(part), generator=generator)[: round(share * len(part))]
    return replace(part, annotated=torch.zeros(len(part)).index_fill(0, chosen, 1.0))


def _shifted(part: Part, generator: torch.Generator) -> Part:
    """Shift the masks by a quarter of the image, in four directions."""
    side = part.masks.shape[-1] // 4
    masks = part.masks.clone()
    for shift, some in zip(((side, 0), (-side, 0), (0, side), (0, -side)), masks.chunk(4), strict=True):
        some.copy_(some.roll(shift, dims=(1, 2)))
    return replace(part, masks=masks)


def _exchanged(part: Part, generator: torch.Generator) -> Part:
    return replace(part, masks=part.masks[torch.randperm(len(part), generator=generator)])


def _inverted(part: Part, generator: torch.Generator) -> Part:
    return replace(part, masks=1 - part.masks)


#: What is done to the masks of the training data.
VARIANTS: dict[str, Callable[[Part, torch.Generator], Part]] = {
    "all": lambda part, generator: part,
    "10 %": partial(_annotated, 0.1),
    "1 %": partial(_annotated, 0.01),
    "shifted": _shifted,
    "of other images": _exchanged,
    "inverted": _inverted,
}

TASKS: dict[str, Task] = {
    "decoy-cdep": Task(
        "DecoyMNIST after Rieger et al. (2020): 5×5 pixels, adversarial in the test",
        partial(digits, "cdep"),
        digits_network,
        epochs=5,
        batch=64,
        optimizer=partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-4),
        held_out=5000,
        published={"unguided": "60.1 ± 5.1", "CDEP": "97.2 ± 0.8", "RRR": "99.0 ± 1.0"},
    ),
    "decoy-xil": Task(
        "DecoyMNIST after Friedrich et al. (2022): 4×4 pixels, random in the test",
        partial(digits, "xil"),
        digits_network,
        # The protocol has 50 epochs of batches of 256; smaller batches find the patch in fewer.
        epochs=20,
        batch=64,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        held_out=5000,
        published={
            "no decoy": "98.9",
            "unguided": "78.9 ± 1.1",
            "RRR": "98.8 ± 0.1",
            "RRR-G": "97.4 ± 0.7",
            "RBR": "99.1 ± 0.1",
            "CDEP": "97.1 ± 0.7",
            "HINT": "96.6 ± 0.4",
        },
        weights_of="decoy-cdep",
    ),
    "faces-lipstick": Task(
        "Drawn faces: lipstick, with make-up of the eyes on 98 %",
        faces,
        partial(small_cnn, 2),
        epochs=10,
        batch=32,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        held_out=600,
        published={},
        decay=True,
    ),
}
