"""What the benchmark of effect trains on: data with a shortcut, a network, and a schedule."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from attnguide import functional
from attnguide.data.decoy import DecoyMNIST, Protocol
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.masks import MaskCompletion
from attnguide.models.networks import small_cnn
from attnguide.priors import FindingPrior, TeacherPrior, TokenCutPrior
from pasted_faces import pasted_faces

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
        flips: Whether half of the images of a step are mirrored, with their masks.
        inpainted: Whether the other image's own object is filled from around it where the outside of
            validation images is exchanged; it lies anywhere in the image, not always at the same place.
        folder: Whether the data is a folder of its own, rather than the digits' file.
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
    flips: bool = False
    inpainted: bool = False
    folder: bool = False


def digits_network() -> nn.Module:
    """The network of both protocols: conv20-5, pool, conv50-5, pool, fc256, fc10."""
    convolutions: list[nn.Module] = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10))


def digits_transformer() -> nn.Module:
    """A small transformer from random weights: patches of 4×4, 4 blocks of 64 channels."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
    )
    return model


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


#: Side of the photographs of birds, in pixels.
BIRDS = 128


def birds(data: Path, seed: int, quick: bool) -> tuple[Part, Part, Part]:
    """Birds on land and water after Sagawa et al. (ICLR 2020): a folder with `metadata.csv`.

    In training nearly all landbirds are on land and nearly all waterbirds on water; in the test every bird is
    in both places. Columns `split` (0 to 2, or train, val, test), `label` or `y`, `place`, `image` or
    `img_filename`, and `mask`. For validation only the birds of the training's distribution are taken: one
    photograph of each pair, in the place that goes with its label.
    """
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    label, image = ("label", "image") if "image" in rows[0] else ("y", "img_filename")
    parts = []
    for number, split in enumerate(("train", "val", "test")):
        some = [row for row in rows if row["split"] in (split, str(number))]
        if split == "val":
            some = [row for row in some if row[label] == row["place"]]
        some = some[:: max(1, len(some) // 64)] if quick else some
        labels = torch.tensor([int(row[label]) for row in some])
        places = torch.tensor([int(row["place"]) for row in some])
        images = torch.stack([_photograph(data / row[image], "RGB") for row in some])
        masks = torch.stack([_photograph(data / row["mask"], "L") for row in some])[:, 0]
        parts.append(Part((images - 0.5) / 0.5, labels, masks, 2 * labels + places))
    train, valid, test = parts
    return train, valid, test


def expressions(data: Path, seed: int, quick: bool) -> tuple[Part, Part, Part]:
    """Happy and surprised faces on photographs of animals and of things; see `pasted_faces`."""
    every = 16 if quick else 1
    train, valid, test = (
        Part(images[::every], labels[::every], masks[::every], (2 * labels + places)[::every])
        for images, labels, masks, places in pasted_faces(data, seed)
    )
    return train, valid, test


def _photograph(path: Path, mode: str) -> Tensor:
    """Read a picture or a mask, `(C, BIRDS, BIRDS)` in [0, 1]."""
    with Image.open(path) as image:
        values = np.asarray(image.convert(mode).resize((BIRDS, BIRDS), Image.Resampling.BILINEAR))
    return torch.from_numpy(values.copy()).view(BIRDS, BIRDS, -1).permute(2, 0, 1).float() / 255


class Frozen(nn.Module):
    """A network of timm whose stem and first blocks stay as they are, statistics of normalization included.

    Args:
        model: The network.
        blocks: Number of blocks.
    """

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        self.model = model
        parts = (
            model.get_submodule(name)
            for name in ("conv_stem", "bn1", *(f"blocks.{n}" for n in range(blocks)))
        )
        self._still = [part.requires_grad_(False) for part in parts]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self._still:
            part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def imagenet_network() -> nn.Module:
    """EfficientNet-Lite0, pretrained on ImageNet: timm's weights, or the file in `$ATTNGUIDE_LITE0`."""
    file = os.environ.get("ATTNGUIDE_LITE0")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=file is None)
    if file is not None:
        model.load_state_dict(load_file(file))
    return model.eval()


def pretrained_network() -> nn.Module:
    """The same with two classes, and what comes before the fifth block frozen."""
    model = imagenet_network()
    model.reset_classifier(2)  # type: ignore[operator]
    return Frozen(model, 4)


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


def _boxes(part: Part, generator: torch.Generator) -> Part:
    """Boxes around the masks."""
    inside = part.masks > 0.5
    rows, columns = inside.any(dim=2), inside.any(dim=1)
    across = (columns.cummax(dim=1).values & columns.flip(1).cummax(dim=1).values.flip(1))[:, None, :]
    down = (rows.cummax(dim=1).values & rows.flip(1).cummax(dim=1).values.flip(1))[:, :, None]
    return replace(part, masks=(across & down).float())


def _narrowed(part: Part, generator: torch.Generator) -> Part:
    """Regions, out of which `MaskCompletion` takes what looks like the outside."""
    known = (~part.masks.isnan().flatten(1).any(dim=1)).nonzero()[:, 0]
    some = known[torch.randperm(len(known), generator=generator)[:600]]
    completion = MaskCompletion(pretrained_network())
    completion.fit([(part.images[i], part.masks[i]) for i in some.split(32)], coarse=True)
    masks = part.masks.clone()
    for i in known.split(32):
        masks[i] = completion(part.images[i], part.masks[i])
    return replace(part, masks=masks)


def _narrowed_boxes(part: Part, generator: torch.Generator) -> Part:
    return _narrowed(_boxes(part, generator), generator)


def _found(prior: FindingPrior, part: Part, generator: torch.Generator) -> Part:
    """Regions that a prior finds with a network of ImageNet, unannotated; NaN where none is found."""
    network, masks = imagenet_network(), []
    prior.prepare(network, 1000)
    for images in part.images.split(32):
        # The size that the network was trained with.
        large = F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            maps, weights = prior.find(large, network(large).argmax(dim=1))
        maps = (functional.resize(maps, (BIRDS, BIRDS)) > 0.5).float()
        masks.append(torch.where(weights[:, None, None] > 0, maps, torch.nan))
    return replace(part, masks=torch.cat(masks))


def _cut(part: Part, generator: torch.Generator) -> Part:
    return _found(TokenCutPrior(), part, generator)


def _narrowed_cut(part: Part, generator: torch.Generator) -> Part:
    return _narrowed(_cut(part, generator), generator)


def _taught(part: Part, generator: torch.Generator) -> Part:
    return _found(TeacherPrior(source="layer_cam", threshold=0.5), part, generator)


def _completed(share: float, part: Part, generator: torch.Generator) -> Part:
    """A share of the masks, from which `MaskCompletion` predicts the others."""
    annotated = _annotated(share, part, generator).annotated
    assert annotated is not None
    given = annotated.nonzero()[:, 0]
    completion = MaskCompletion(pretrained_network()).fit(
        [(part.images[i], part.masks[i]) for i in given.split(32)]
    )
    masks = torch.cat([completion(part.images[i]) for i in torch.arange(len(part)).split(32)])
    return replace(part, masks=torch.where(annotated[:, None, None] > 0, part.masks, masks))


def _grown(pixels: int, part: Part, generator: torch.Generator) -> Part:
    """Masks dilated by some pixels, or eroded if the number is negative; none is left empty."""
    size = 2 * abs(pixels) + 1
    masks = part.masks if pixels > 0 else -part.masks
    masks = F.max_pool2d(masks[:, None], size, 1, abs(pixels))[:, 0] * (1 if pixels > 0 else -1)
    left = masks.flatten(1).any(dim=1)
    return replace(part, masks=torch.where(left[:, None, None], masks, part.masks))


#: What is done to the masks of the training data.
VARIANTS: dict[str, Callable[[Part, torch.Generator], Part]] = {
    "all": lambda part, generator: part,
    "10 %": partial(_annotated, 0.1),
    "1 %": partial(_annotated, 0.01),
    "10 %, completed": partial(_completed, 0.1),
    "1 %, completed": partial(_completed, 0.01),
    "boxes": _boxes,
    "boxes, narrowed": _narrowed_boxes,
    "found by `token_cut`": _cut,
    "found by `token_cut`, narrowed": _narrowed_cut,
    "found by `teacher`": _taught,
    "eroded": partial(_grown, -4),
    "dilated": partial(_grown, 8),
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
    "decoy-vit": Task(
        "DecoyMNIST after Rieger et al. (2020), a small vision transformer from random weights",
        partial(digits, "cdep"),
        digits_transformer,
        epochs=2,
        batch=64,
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
        held_out=5000,
        published={},
        decay=True,
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
    "birds": Task(
        "Waterbirds after Sagawa et al. (2020), small: photographs, a network pretrained on ImageNet",
        birds,
        pretrained_network,
        epochs=6,
        batch=32,
        optimizer=partial(torch.optim.AdamW, lr=5e-4),
        held_out=70,
        published={},
        decay=True,
        flips=True,
        inpainted=True,
        folder=True,
    ),
}

# The second set of photographs: everything as for the birds, and nothing chosen on it.
TASKS["expressions"] = replace(
    TASKS["birds"],
    about="Happy and surprised faces, pasted onto photographs of animals and things; a network pretrained on "
    "ImageNet",
    parts=expressions,
    held_out=36,
)
