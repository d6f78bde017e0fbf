"""Facial expressions, guided by action units (arXiv 2402.00281): classifiers trained with and without.

With `--data ROOT` it reads RAF-DB, AffectNet, or a folder with a table `*.npz` of `files`, `labels`,
`classes`, `landmarks68` and, if there are any, `identity`, whose images are in `ROOT/images`. Without, it
draws faces. With `--folds N` identities are split into N parts, each of which is tested once. It prints, for
each run and on average, the accuracy, ATT-COS (the layer attention, which is optimised) and CAM-COS
(activation maps, which are not), and writes a picture with a row for each of some faces: action units, then
attention and Grad-CAM, unguided and guided.

    python examples/fer.py                                        # drawn faces
    python examples/fer.py --data RAF-DB --landmarks rafdb.npz --model resnet50 --size 112
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import attnguide as ag
from attnguide.data.procedural.faces import EXPRESSIONS, ProceduralFaces
from attnguide.errors import AttnGuideError, DataError, InputError
from attnguide_action_units.datasets import RAFDB, AffectNet, FaceTable
from attnguide_action_units.evaluation import CAMS, Report, evaluate
from attnguide_action_units.landmarks import MIRROR, to_68
from attnguide_action_units.prior import ActionUnitPrior


@dataclass(frozen=True)
class Faces:
    """Faces in memory."""

    images: Tensor
    labels: Tensor
    landmarks: Tensor
    people: Tensor
    classes: tuple[str, ...]

    def at(self, index: Tensor) -> Faces:
        """Return some of them."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            landmarks=self.landmarks[index],
            people=self.people[index],
        )


# ------------------------------------------------------------------------------ data


def standardized(images: Tensor) -> Tensor:
    """Grey images of one channel, each of mean 0 and deviation 1: colour and exposure say nothing here."""
    gray = transforms.rgb_to_grayscale(images)
    return (gray - gray.mean(dim=(2, 3), keepdim=True)) / gray.std(dim=(2, 3), keepdim=True).clamp(min=1e-3)


def colored(images: Tensor) -> Tensor:
    """Three channels, as the models want them."""
    return images.expand(-1, 3, -1, -1)


def from_table(data: FaceTable, size: int, people: Sequence[int] | None = None) -> Faces:
    """Read all images of a data set, resized."""
    if data.without_landmarks == len(data):
        raise DataError(
            "no image has landmarks, so that nothing would be guided; find some, and give --landmarks."
        )
    print(f"{len(data)} faces, {data.without_landmarks} of them without landmarks")
    images, landmarks = [], []
    for index in track(range(len(data)), "reading", console=Console(stderr=True), transient=True):
        sample = data[index]
        landmarks.append(transforms.resize(sample.landmarks, [size, size]).as_subclass(Tensor))
        images.append(transforms.resize(sample.image, [size, size], antialias=True).as_subclass(Tensor))
    numbers = torch.arange(len(data)) if people is None else torch.as_tensor(people)
    return Faces(
        standardized(torch.stack(images)), data.labels, torch.stack(landmarks), numbers, data.classes
    )


def table_in(root: Path, folds: int) -> tuple[FaceTable, list[int]]:
    """Read a folder with a table; classes with too little to split are left out, and named."""
    files = sorted(root.glob("*.npz"))
    if len(files) != 1:
        raise DataError(
            f"{root} holds neither RAF-DB nor AffectNet, and {len(files)} tables *.npz; expected one, with "
            "files, labels, classes and landmarks68."
        )
    with np.load(files[0], allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    missing = [name for name in ("files", "labels", "classes", "landmarks68") if name not in arrays]
    if missing:
        raise DataError(f"{files[0]} has no {', '.join(missing)}; it has {', '.join(arrays)}.")
    if folds < 2:
        raise InputError(
            "--folds must be at least 2: the people of one part are tested, the others trained with."
        )
    people = np.unique(arrays.get("identity", np.arange(len(arrays["files"]))), return_inverse=True)[1]
    labels, classes = arrays["labels"].astype(int), [str(name) for name in arrays["classes"]]
    enough = []
    for c, name in enumerate(classes):
        faces, persons = int((labels == c).sum()), len(np.unique(people[labels == c]))
        if faces >= 10 * folds and persons >= folds:
            enough.append(c)
        else:
            print(f"left out: {name}, {faces} faces of {persons} people")
    kept = np.isin(labels, enough)
    pictures_of = [root / "images" / str(name) for name in arrays["files"][kept]]
    renumbered = [enough.index(label) for label in labels[kept]]
    points = to_68(arrays["landmarks68"][kept])
    if not enough:
        raise DataError(f"{root}: no class has 10 faces for each of {folds} folds; give fewer --folds.")
    return FaceTable(pictures_of, renumbered, points, [classes[c] for c in enough]), people[kept].tolist()


def drawn(count: int, size: int, seed: int) -> Faces:
    """Draw faces, as often happy as anything else: by default half of them smile."""
    faces = ProceduralFaces(count, size, seed=seed, prevalence={"smiling": 1 / 7}).stack()
    return Faces(
        standardized(faces.image.as_subclass(Tensor)),
        faces.expression,
        faces.landmarks.as_subclass(Tensor),
        torch.arange(count),
        EXPRESSIONS,
    )


def load(options: argparse.Namespace) -> list[tuple[Faces, Faces]]:
    """Return pairs of faces to train with and to test with."""
    if options.data is None:
        return [
            (
                drawn(options.faces, options.size, 2 * seed),
                drawn(options.faces // 2, options.size, 2 * seed + 1),
            )
            for seed in range(options.seed, options.seed + options.folds)
        ]
    root: Path = options.data
    if (root / "train_set").is_dir():
        parts = [from_table(AffectNet(root, split), options.size) for split in ("train", "val")]
        return [(parts[0], parts[1])] * options.folds
    if (root / "basic").is_dir() or (root / "EmoLabel").is_dir():
        parts = [
            from_table(RAFDB(root, split, landmarks=options.landmarks), options.size)
            for split in ("train", "test")
        ]
        return [(parts[0], parts[1])] * options.folds
    table, people = table_in(root, options.folds)
    faces = from_table(table, options.size, people)
    order = torch.randperm(int(faces.people.max()) + 1, generator=torch.Generator().manual_seed(options.seed))
    fold = (order % options.folds)[faces.people]
    return [
        (faces.at((fold != number).nonzero()[:, 0]), faces.at((fold == number).nonzero()[:, 0]))
        for number in range(options.folds)
    ]


def augmented(faces: Faces) -> Faces:
    """Flip, turn, scale and shift each face, and its landmarks with it."""
    images, points, (count, *_, side) = faces.images, faces.landmarks, faces.images.shape
    flip = torch.rand(count) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    mirrored = points[:, list(MIRROR)] * torch.tensor([-1.0, 1.0]) + torch.tensor([side - 1.0, 0.0])
    points = torch.where(flip[:, None, None], mirrored, points)
    angle, scale = 0.35 * (torch.rand(count) - 0.5), 1 + 0.2 * (torch.rand(count) - 0.5)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    turn, shift = turn * scale[:, None, None], 0.12 * (torch.rand(count, 2) - 0.5)
    grid = F.affine_grid(torch.cat([turn, shift[..., None]], dim=2), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # The grid maps output to input pixels; landmarks go the other way.
    places = (points + 0.5) * 2 / side - 1 - shift[:, None]
    places = torch.linalg.solve(turn[:, None], places[..., None])[..., 0]
    return replace(faces, images=images, landmarks=(places + 1) * side / 2 - 0.5)


def covered(faces: Faces, seed: int = 0) -> dict[str, Tensor]:
    """Cover a square of each face, a quarter of a side wide, where hardly an action unit is seen.

    Once with black, and once with the mouth of another face, which says something, but in the wrong place.
    """
    generator = torch.Generator().manual_seed(seed)
    count, _, side, _ = faces.images.shape
    width = side // 4
    prior = ActionUnitPrior(classes=faces.classes, generic=True)
    units = prior.draw(faces.landmarks, faces.labels, (side, side), (side, side)).maps
    shown = F.avg_pool2d(units[:, None], width, stride=1)[:, 0].flatten(1)
    free = shown <= shown.amin(dim=1, keepdim=True) + 0.01
    chosen = torch.multinomial(free.float(), 1, generator=generator)[:, 0]
    others = torch.randperm(count, generator=generator)
    mouths = faces.landmarks[others, 48:].mean(dim=1) - width / 2
    corners = mouths.round().int().clamp(0, side - width).flip(1).tolist()
    black, mouth = faces.images.clone(), faces.images.clone()
    darkest = faces.images.amin()
    for index, (window, other, (y, x)) in enumerate(
        zip(chosen.tolist(), others.tolist(), corners, strict=True)
    ):
        top, left = divmod(window, side - width + 1)
        square = (index, slice(None), slice(top, top + width), slice(left, left + width))
        black[square] = darkest
        mouth[square] = faces.images[other, :, y : y + width, x : x + width]
    return {"black square": black, "another's mouth": mouth}


# -------------------------------------------------------------------------- training


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    """Make an untrained model that fits small images."""
    settings: dict[str, Any] = {"num_classes": classes}
    model: nn.Module = timm.create_model(options.model, **settings)
    if isinstance(model, timm.models.VisionTransformer):
        settings |= {"img_size": options.size, "patch_size": min(16, max(8, options.size // 8))}
        model = timm.create_model(options.model, **settings)
    if options.size < 100 and isinstance(getattr(model, "maxpool", None), nn.MaxPool2d):
        model.maxpool = nn.Identity()  # else little would be left of the image
    return model


def train(options: argparse.Namespace, faces: Faces, layer: str, weight: float, seed: int) -> nn.Module:
    """Train a model; with a weight of 0 it is not guided. The same seed begins with the same weights."""
    torch.manual_seed(seed)
    model = build(options, len(faces.classes)).train().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05)
    batches = len(faces.labels) // options.batch
    if not batches:
        raise InputError(f"--batch {options.batch} is more than the {len(faces.labels)} faces to train with.")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=options.epochs * batches
    )
    prior = ActionUnitPrior(classes=faces.classes)
    guide = ag.Guide.from_recipe(model, "au-codebook", prior=prior, weight=weight, layer=layer)
    with guide:
        for _ in track(range(options.epochs), "training", console=Console(stderr=True), transient=True):
            for index in torch.randperm(len(faces.labels))[: batches * options.batch].split(options.batch):
                part = augmented(faces.at(index))
                labels = part.labels.to(options.device)
                logits = model(colored(part.images).to(options.device))
                loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
                if weight:
                    loss = loss + guide.loss(labels, landmarks=part.landmarks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def measured(options: argparse.Namespace, model: nn.Module, faces: Faces) -> dict[str, float]:
    """Accuracy, its mean over classes, with a part of the image covered, and the cosines."""
    parts = torch.arange(len(faces.labels)).split(64)
    place = options.device
    batches = (
        (colored(faces.images[i]).to(place), faces.labels[i].to(place), faces.landmarks[i]) for i in parts
    )
    prior = ActionUnitPrior(classes=faces.classes)
    report: Report = evaluate(model, batches, prior, layers=options.layers, cams=CAMS)

    def correct(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([model(colored(images[i]).to(options.device)).cpu() for i in parts])
        return (logits.argmax(dim=1) == faces.labels).float()

    right = correct(faces.images)
    by_class = [float(right[faces.labels == c].mean()) for c in faces.labels.unique()]
    # Photographs are cropped so closely that there is no place outside the action units.
    elsewhere = covered(faces) if options.data is None else {}
    return {
        "accuracy": report.accuracy,
        "mean accuracy": mean(by_class),
        **{f"accuracy, {what}": float(correct(images).mean()) for what, images in elsewhere.items()},
        **{f"ATT-COS {name}": value for name, value in report.attention.items()},
        **{f"CAM-COS {name}": value for name, value in report.cams.items()},
    }


# -------------------------------------------------------------------------- pictures


def pictures(options: argparse.Namespace, models: Sequence[nn.Module], faces: Faces) -> None:
    """Write a row for each of some faces: action units, then attention and Grad-CAM of each model."""
    shown = [int((faces.labels == c).nonzero()[0]) for c in faces.labels.unique()]
    some = faces.at(torch.tensor(shown))
    plain = colored((some.images - some.images.amin()) / (some.images.amax() - some.images.amin()))
    size = (options.size, options.size)
    maps = [ActionUnitPrior(classes=faces.classes).draw(some.landmarks, some.labels, size, size).maps]
    for model in models:
        for source in ("layer_attention", "grad_cam"):
            images, labels = colored(some.images).to(options.device), some.labels.to(options.device)
            seen = ag.explain(model, images, source, "labels", options.layers[-1], labels=labels)
            maps.append(seen.scaled()[:, 0].cpu())
    # Large enough to be looked at.
    factor = max(1, round(112 / options.size))
    shown_maps = F.interpolate(torch.stack(maps, dim=1), scale_factor=factor, mode="bilinear")
    overlays = ag.visual.overlay(
        F.interpolate(plain, scale_factor=factor, mode="bicubic").clamp(0, 1), shown_maps
    )
    rows = [torch.cat(list(row), dim=2) for row in overlays]
    ag.visual.to_pil(torch.cat(rows, dim=1)).save(options.out / "expressions.png")


# ------------------------------------------------------------------------------ main


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="RAF-DB, AffectNet, or a folder with a table; drawn faces without")
    add("--landmarks", type=Path, help="table of landmarks, for RAF-DB")
    add("--faces", type=int, default=600, help="number of drawn faces")
    add("--model", default="resnet18", help="a model of timm")
    add("--layers", nargs="+", default=["auto"], help="guided layers, one after the other, as in stage:-2")
    add("--size", type=int, default=64, help="of the images, in pixels")
    add("--weights", nargs="+", type=float, default=[9.0], help="λ, one after the other")
    add("--folds", type=int, default=3, help="parts of the identities, or seeds where a test set exists")
    add("--seed", type=int, default=0, help="of the first run")
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-3, help="highest learning rate")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("attnguide-expressions"), help="folder for results")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data} is not a folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        run(options)
    except (AttnGuideError, OSError) as error:
        sys.exit(f"fer.py: {error}")


def run(options: argparse.Namespace) -> None:
    """Train and test each way in each fold, and write what was found."""
    # The layer and λ of each way to train; a λ of 0 means no guidance.
    ways = {"unguided": (options.layers[-1], 0.0)} | {
        f"{layer}, λ = {weight:g}": (layer, weight) for layer in options.layers for weight in options.weights
    }
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed, (train_faces, test_faces) in enumerate(load(options), options.seed):
        models = []
        for way, (layer, weight) in ways.items():
            models.append(train(options, train_faces, layer, weight, seed))
            runs[way].append(measured(options, models[-1], test_faces))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in runs[way][-1].items())
            print(f"run {seed}, {way}: {shown}", flush=True)
    pictures(options, [models[0], models[-1]], test_faces)
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.out / "result.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))
    print(f"\n| {options.model} | {' | '.join(ways)} |\n| --- |{' --: |' * len(ways)}")
    for name in runs["unguided"][0]:
        cells = []
        for found in runs.values():
            values = [run[name] for run in found]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{options.out / 'expressions.png'}: action units; attention and Grad-CAM, unguided, then guided")


if __name__ == "__main__":
    main()
