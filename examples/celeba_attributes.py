"""Facial attributes and regions of the face (CVPR 2017): SSP and SSG, and what they are compared with.

With `--data ROOT`, the folder that holds CelebA's folder `celeba` (with `--lfwa`, the folder of LFWA), it
follows the publication: its own network from random weights, AdaGrad, batches of 32, a learning rate of 1e-3,
weight decay of 5e-4, flips, 40,000 iterations; the parser has to be trained on photographs first
(`--parser`; `face_parsing.py` trains one). Without, the same code runs on drawn faces that are hard to
classify: few, in clutter and noise, partly covered, and with attributes that are rare. For each method it
prints the classification error, the average precision, and, fine-tuned with balanced weights, the balanced
accuracy; and it writes `result.json` and pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms import v2

import attnguide as ag
from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide.metrics import average_precision, balanced_accuracy, classification_error
from attnguide_segmentation.adapted import RegionAdapters, attach
from attnguide_segmentation.boxes import landmark_boxes
from attnguide_segmentation.figures import colors, region_weights, sheet, top_channels, weights_figure
from attnguide_segmentation.lfwa import LFWA
from attnguide_segmentation.metrics import balanced_bce
from attnguide_segmentation.network import attribute_network
from attnguide_segmentation.parser import Parser, load_parser

#: What is put on the network, as `attach` names it; None for nothing.
METHODS: dict[str, str | None] = {
    "average pooling": None,
    "SPPNet*": "pyramid",
    "naive": "mask_channels",
    "BBox": "boxes",
    "SSG": "ssg",
    "SSP": "ssp",
}
#: How often the drawn faces have an attribute: a long tail.
PREVALENCE = {
    "lipstick": 0.4, "heavy_makeup": 0.3, "smiling": 0.4, "mouth_open": 0.4, "eyeglasses": 0.08,
    "moustache": 0.06, "goatee": 0.06, "bushy_eyebrows": 0.15, "earrings": 0.12, "pale_skin": 0.1,
    "black_hair": 0.3, "blond_hair": 0.12, "brown_hair": 0.25, "bald": 0.04, "bangs": 0.15, "hat": 0.05,
}  # fmt: skip
_CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Faces:
    """Faces in memory, in bytes.

    Attributes:
        images: `(N, 3, H, W)`, 0 to 255.
        labels: `(N, K)`, 0 or 1.
        masks: Masks of the seven regions, `(N, 7, h, w)`, 0 to 255.
        points: Landmarks `(N, 5 or 68, 2)` in pixels, for the boxes; NaN where there are none.
        classes: Names of the attributes.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    points: Tensor
    classes: tuple[str, ...]


# ------------------------------------------------------------------------------ data


def with_masks(
    images: Tensor, labels: Tensor, points: Tensor, classes: Sequence[str], parser: Parser
) -> Faces:
    """Find the regions, once for all: the parser is frozen."""
    parts = track(torch.split(images, 64), "finding regions", console=_CONSOLE, transient=True)
    masks = torch.cat([(parser(part.float() / 255) * 255).round().byte() for part in parts])
    return Faces(images, labels, masks, points, tuple(classes))


def covered(images: Tensor, seed: int) -> Tensor:
    """Cover a part of each image with a box of one colour."""
    generator = torch.Generator().manual_seed(seed)
    images = images.clone()
    for image in images:
        _, height, width = image.shape
        tall, wide = (
            int(torch.randint(side // 8, side // 3, (), generator=generator)) for side in (height, width)
        )
        top = int(torch.randint(height - tall, (), generator=generator))
        left = int(torch.randint(width - wide, (), generator=generator))
        color = torch.randint(256, (3, 1, 1), generator=generator).byte()
        image[:, top : top + tall, left : left + wide] = color
    return images


def drawn(count: int, size: int, seed: int, parser: Parser) -> Faces:
    """Draw faces that are hard to classify."""
    data = ProceduralFaces(count, size, seed=seed, prevalence=PREVALENCE, pose=2.0, clutter=1.0, noise=0.12)
    faces = data.stack()
    images = covered((faces.image.as_subclass(Tensor) * 255).round().byte(), seed)
    return with_masks(images, faces.attributes, faces.landmarks.as_subclass(Tensor), ATTRIBUTES, parser)


def photographs(options: argparse.Namespace, split: str, parser: Parser) -> Faces:
    """Read CelebA or LFWA, resized."""
    size = options.size
    transform = v2.Compose([v2.PILToTensor(), v2.Resize([size, size], antialias=True)])
    data: Any
    if options.lfwa:
        data = LFWA(options.data, split, transform=transform)
    else:
        data = CelebA(options.data, split, images=options.images, transform=transform)
    count = min(len(data), options.limit or len(data))
    pairs = [
        data[index] for index in track(range(count), f"reading {split}", console=_CONSOLE, transient=True)
    ]
    points = torch.full((count, 5, 2), torch.nan)
    if not options.lfwa:  # in pixels of the aligned images
        points = data.landmarks_align[:count].view(-1, 5, 2) * torch.tensor([size / 178, size / 218])
    images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    return with_masks(images, labels, points, data.classes, parser)


def load(options: argparse.Namespace, seed: int) -> tuple[Faces, Faces]:
    """Return faces to train with and to test with."""
    parser = load_parser(options.parser)
    if options.data is None:
        return (
            drawn(options.faces, options.size, 2 * seed, parser),
            drawn(1000, options.size, 2 * seed + 1, parser),
        )
    return photographs(options, "train", parser), photographs(options, "test", parser)


# -------------------------------------------------------------------------- training


def standardized(images: Tensor) -> Tensor:
    """Bytes to numbers around 0."""
    return (images.float() / 255 - 0.5) / 0.25


class Classifier:
    """The publication's network, with one of the methods on it.

    Args:
        options: Settings.
        faces: Some faces.
        method: Name of the method that `attach` adds to the network; None for none.
    """

    def __init__(self, options: argparse.Namespace, faces: Faces, method: str | None) -> None:
        self.method = method
        self.model = attribute_network(len(faces.classes), width=options.width)
        self.adapted: RegionAdapters | None = None
        if method is not None:
            # SSG is in place of the third pooling, as in the publication.
            settings: dict[str, Any] = {"gate": "block3", "start": "paper"} if method == "ssg" else {}
            self.adapted = attach(self.model, standardized(faces.images[:2]), method, **settings)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        own = [] if self.adapted is None else list(self.adapted.parameters())
        return [*self.model.parameters(), *own]

    def __call__(self, faces: Faces, index: Tensor, mirror: Tensor | None = None) -> Tensor:
        """Compute logits of some of the faces, some of them mirrored."""
        images = standardized(faces.images[index])
        masks = faces.masks[index].float() / 255
        if self.method == "boxes":
            masks = landmark_boxes(faces.points[index], (images.shape[-2], images.shape[-1]))
        if mirror is not None:
            mirror = mirror[:, None, None, None]
            images = torch.where(mirror, images.flip(3), images)
            masks = torch.where(mirror, masks.flip(3), masks)
        if self.adapted is not None:
            self.adapted.finder.give(masks)
        logits: Tensor = self.model(images)
        return logits

    def train(
        self, options: argparse.Namespace, faces: Faces, iterations: int, *, balanced: bool = False
    ) -> None:
        """Train as the publication does."""
        share = faces.labels.mean(dim=0).clamp(1e-3, 1 - 1e-3)
        optimizer = torch.optim.Adagrad(self.parameters(), lr=options.rate, weight_decay=5e-4)
        self.model.train()
        order: list[Tensor] = []
        for _ in track(range(iterations), "training", console=_CONSOLE, transient=True):
            if not order:
                order = list(torch.randperm(len(faces.images))[: len(faces.images) // 32 * 32].split(32))
            index = order.pop()
            logits, labels = self(faces, index, torch.rand(len(index)) < 0.5), faces.labels[index]
            if balanced:
                loss = balanced_bce(logits, labels, share)
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def scores(self, faces: Faces) -> Tensor:
        """Logits of all faces, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self(faces, index) for index in torch.arange(len(faces.images)).split(64)])


Found = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Run:
    """Results of one seed.

    Attributes:
        found: Values of each attribute by method and measure.
        weights: Weight of each region for each attribute in SSP, `(7, K)`; None without SSP.
        classifiers: The networks, as they were before the balanced weights.
        faces: Faces of the test.
    """

    found: Found
    weights: Tensor | None
    classifiers: dict[str, Classifier]
    faces: Faces


def run(options: argparse.Namespace, seed: int) -> Run:
    """Train and test each method once."""
    faces, test = load(options, seed)
    plain: dict[str, Tensor] = {}
    balanced: dict[str, Tensor] = {}
    classifiers: dict[str, Classifier] = {}
    weights = None
    for name in options.methods:
        torch.manual_seed(seed)
        classifier = Classifier(options, faces, METHODS[name])
        classifier.train(options, faces, options.iterations)
        plain[name] = classifier.scores(test)
        if name == "SSP":
            weights = believed(classifier, test)
        if seed == options.seed:  # for the pictures
            classifiers[name] = copy.deepcopy(classifier)
        classifier.train(options, faces, max(1, options.iterations // 5), balanced=True)
        balanced[name] = classifier.scores(test)
    if {"SSP", "SSG"} <= set(plain):
        for scores in (plain, balanced):
            scores["SSP + SSG"] = (scores["SSP"] + scores["SSG"]) / 2
    found = {
        name: {
            "classification error": classification_error(plain[name], test.labels).tolist(),
            "average precision": average_precision(plain[name], test.labels).tolist(),
            "balanced accuracy": balanced_accuracy(balanced[name], test.labels).tolist(),
        }
        for name in plain
    }
    for name, measures in found.items():
        shown = ", ".join(f"{what} {100 * average(values):.2f}" for what, values in measures.items())
        print(f"seed {seed}, {name}: {shown}", flush=True)
    return Run(found, weights, classifiers, test)


def believed(classifier: Classifier, faces: Faces) -> Tensor:
    """How much SSP lets each region count for each attribute, on average over the faces that have it."""
    assert classifier.adapted is not None
    weights = []
    for index in torch.arange(len(faces.images)).split(64):
        classifier.adapted.finder.give(faces.masks[index].float() / 255)
        weights.append(region_weights(classifier.adapted, standardized(faces.images[index])))
    have = faces.labels[:, None] / faces.labels.sum(dim=0).clamp(min=1)
    return (torch.cat(weights) * have).sum(dim=0)


def average(values: Sequence[float]) -> float:
    """Mean over the attributes that some faces have and others have not."""
    return mean(value for value in values if value == value)


# -------------------------------------------------------------------------- pictures


def pictures(options: argparse.Namespace, first: Run) -> None:
    """Write what the publication's figures 3, 4 and 5 show."""
    faces, size = first.faces, (options.size, options.size)
    some = faces.images[:8].float() / 255
    pairs = torch.cat([some, colors(faces.masks[:8], size)], dim=2)
    ag.visual.to_pil(torch.cat(list(pairs), dim=2)).save(options.out / "regions.png")
    if first.weights is not None:
        weights_figure(first.weights, faces.classes, options.out / "weights.png")
    rows = []
    for name in ("average pooling", "SSP"):
        if name in first.classifiers:
            model = first.classifiers[name].model.eval()
            with torch.no_grad():
                features = model[: list(dict(model.named_children())).index("pool")](
                    standardized(faces.images[:1])
                )
            rows.append(
                sheet(F.interpolate(top_channels(features[0])[None], scale_factor=6.0)[0], columns=25)
            )
    if rows:
        ag.visual.to_pil(torch.cat(rows, dim=1)).save(options.out / "channels.png")


# ------------------------------------------------------------------------------ main


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds CelebA's folder celeba; drawn faces without")
    add("--lfwa", action="store_true", help="--data is the folder of LFWA")
    add(
        "--images",
        default="img_align_celeba",
        help="CelebA's folder of images; img_celeba for the original ones",
    )
    add("--limit", type=int, help="number of images to read of each split")
    add(
        "--parser",
        type=Path,
        help="file of a parser; needed with --data, since the embedded one knows drawn faces only",
    )
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--faces", type=int, default=600, help="number of drawn faces to train with")
    add("--size", type=int, help="of the images, in pixels; 96 for drawn faces, 178 for photographs")
    add("--width", type=int, help="channels of the first block; 16 for drawn faces, 64 for photographs")
    add("--iterations", type=int, help="300 for drawn faces, 40,000 for photographs")
    add("--rate", type=float, default=1e-3, help="learning rate")
    add("--seed", type=int, default=0, help="the first one")
    add("--seeds", type=int, default=1, help="how many")
    add("--out", type=Path, default=Path("attnguide-attributes"), help="folder for results")
    options = parser.parse_args()
    if options.data is not None and options.parser is None:
        parser.error(
            "--data needs --parser FILE: the embedded parser knows drawn faces only. face_parsing.py "
            "--helen HELEN --celeba CELEBA trains one on photographs"
        )
    small = options.data is None
    options.size = options.size or (96 if small else 178)
    options.width = options.width or (16 if small else 64)
    options.iterations = options.iterations or (300 if small else 40_000)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        run_all(options)
    except (AttnGuideError, OSError) as error:
        sys.exit(f"celeba_attributes.py: {error}")


def run_all(options: argparse.Namespace) -> None:
    """Train and test with each seed, and write what was found."""
    runs = []
    for seed in range(options.seed, options.seed + options.seeds):
        runs.append(run(options, seed))
        if seed == options.seed:
            pictures(options, runs[0])
    classes = runs[0].faces.classes
    settings = {key: str(value) for key, value in vars(options).items()}
    found = [one.found for one in runs]
    result: dict[str, Any] = {"settings": settings, "classes": classes, "runs": found}
    print(table_of(found))
    if "SSP" in options.methods:
        result["weights"] = [one.weights.tolist() for one in runs if one.weights is not None]
    (options.out / "result.json").write_text(json.dumps(result, indent=1))


def table_of(runs: Sequence[Found]) -> str:
    """Put means over the attributes, and their deviation over the seeds, into a table."""
    measures = list(next(iter(runs[0].values())))
    lines = [f"\n| | {' | '.join(f'{what} %' for what in measures)} |", f"|---|{'--:|' * len(measures)}"]
    for name in runs[0]:
        cells = []
        for what in measures:
            values = [100 * average(found[name][what]) for found in runs]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
