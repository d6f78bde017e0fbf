"""Do attributes help to find the regions of a face (CVPR 2017, Table 4)? A network trained with and without.

The parsing network shares its encoder with a network for attributes. Both are trained together, on separate
data: few faces with label maps, and more with attributes alone. With `--helen` and `--celeba`, the
folders of these data sets, it reads photographs; without, it draws faces. It prints the intersection over
union of each region on unseen faces, without and with attributes. It saves the parser with the greatest mean,
`parser.safetensors`, for `attach(…, regions=FILE)`, `SegmentationPrior(parser=FILE)` and `load_parser(FILE)`;
`celeba_attributes.py` takes it as `--parser FILE`.

    python examples/face_parsing.py                                     # drawn faces
    python examples/face_parsing.py --helen HELEN --celeba CELEBA --size 178 --width 64 --iterations 75000
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.datasets import ParsingSample, helen
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.network import JointNetwork
from attnguide_segmentation.parser import Parser, save_parser, standardized
from attnguide_segmentation.parsing import parsing_loss
from attnguide_segmentation.regions import REGIONS, merged

WAYS = ("without attributes", "with attributes")
Pairs = tuple[Tensor, Tensor]
_CONSOLE = Console(stderr=True)


# ------------------------------------------------------------------------------ data


def in_bytes(images: Tensor) -> Tensor:
    """Images take a quarter of the memory so."""
    return (images.as_subclass(Tensor) * 255).round().byte()


def drawn(options: argparse.Namespace, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """Draw faces with regions to train with, with attributes to train with, and with regions to test with."""
    few, many, test = (
        ProceduralFaces(count, options.size, seed=3 * seed + part, pose=2.0, clutter=1.0, noise=0.08).stack()
        for part, count in enumerate((options.labelled, options.faces, 300))
    )
    return (
        (in_bytes(few.image), merged(few.segmentation.as_subclass(Tensor))),
        (in_bytes(many.image), many.attributes),
        (in_bytes(test.image), merged(test.segmentation.as_subclass(Tensor))),
    )


def with_regions(data: Dataset[ParsingSample], count: int) -> Pairs:
    """Read faces with label maps."""
    samples = [data[index] for index in track(range(count), "reading", console=_CONSOLE, transient=True)]
    return in_bytes(torch.stack([one.image for one in samples])), torch.stack(
        [one.regions.as_subclass(Tensor) for one in samples]
    )


def photographs(options: argparse.Namespace) -> tuple[Pairs, Pairs, Pairs]:
    """Read Helen and CelebA."""
    square = v2.Resize([options.size, options.size], antialias=True)
    parts = [helen(options.helen, split, transform=square) for split in ("train", "test")]
    celeba = CelebA(options.celeba, "train", transform=v2.Compose([v2.PILToTensor(), square]))
    count = min(options.faces, len(celeba))
    faces = [celeba[index] for index in track(range(count), "reading", console=_CONSOLE, transient=True)]
    images, labels = (torch.stack(part) for part in zip(*faces, strict=True))
    train, test = (with_regions(part, len(part)) for part in parts)
    return train, (images, labels), test


# -------------------------------------------------------------------------- training


def mirrored(images: Tensor, regions: Tensor) -> Pairs:
    """Flip half of the faces, and their regions with them."""
    flip = torch.rand(len(images)) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images), torch.where(
        flip[:, None, None], regions.flip(2), regions
    )


def train(options: argparse.Namespace, faces: Pairs, others: Pairs, way: str, seed: int) -> Parser:
    """Train the network; without attributes the other half of it stays as it is."""
    torch.manual_seed(seed)
    device = torch.device(options.device)
    network = JointNetwork(others[1].shape[1], width=options.width).to(device).train()
    optimizer = torch.optim.Adagrad(network.parameters(), lr=options.rate, weight_decay=5e-4)
    for _ in track(range(options.iterations), way, console=_CONSOLE, transient=True):
        index = torch.randint(len(faces[0]), (options.batch,))
        images, regions = mirrored(faces[0][index].float() / 255, faces[1][index])
        loss = parsing_loss(network.parser(standardized(images.to(device))), regions.to(device))
        if way == "with attributes":
            index = torch.randint(len(others[0]), (options.batch,))
            logits = network.attributes(standardized(others[0][index].to(device).float() / 255))
            loss = loss + F.binary_cross_entropy_with_logits(logits, others[1][index].to(device).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Parser(network.parser, size=options.size)


def overlap(options: argparse.Namespace, parser: Parser, faces: Pairs) -> list[float]:
    """Intersection over union of each region."""
    found = torch.cat(
        [parser(part.to(options.device).float() / 255).argmax(dim=1).cpu() for part in faces[0].split(50)]
    )
    return region_iou(found, faces[1]).tolist()


# ------------------------------------------------------------------------------ main


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--helen", type=Path, help="folder of Helen with its label maps; drawn faces without")
    add("--celeba", type=Path, help="folder that holds CelebA's folder celeba")
    add("--labelled", type=int, default=100, help="number of drawn faces with regions")
    add("--faces", type=int, default=1000, help="number of faces with attributes")
    add("--size", type=int, default=96, help="of the images, in pixels")
    add("--width", type=int, default=8, help="channels of the first block; 64 in the publication")
    add("--iterations", type=int, default=300)
    add("--batch", type=int, default=16)
    add("--rate", type=float, default=1e-2, help="learning rate; 1e-3 in the publication")
    add("--seed", type=int, default=0, help="the first one")
    add("--seeds", type=int, default=1, help="how many")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("attnguide-parsing"), help="folder for results")
    options = parser.parse_args()
    if (options.helen is None) != (options.celeba is None):
        parser.error("--helen and --celeba go together: one has the regions, the other the attributes")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        run(options)
    except (AttnGuideError, OSError) as error:
        sys.exit(f"face_parsing.py: {error}")


def run(options: argparse.Namespace) -> None:
    """Train and test both ways with each seed, and write what was found, and the best parser."""
    best, file = -1.0, options.out / "parser.safetensors"
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    real = None if options.helen is None else photographs(options)
    for seed in range(options.seed, options.seed + options.seeds):
        faces, others, test = real or drawn(options, seed)
        for way in WAYS:
            parser = train(options, faces, others, way, seed)
            runs[way].append(overlap(options, parser, test))
            # NaN stands for a region that no face of the test has.
            average = mean(value for value in runs[way][-1] if value == value)
            print(f"seed {seed}, {way}: mean IoU {average:.3f}", flush=True)
            if average > best:
                best = average
                save_parser(file, parser)
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.out / "result.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))
    print(table_of(runs))
    print(f'\nThe parser with a mean IoU of {best:.3f} is {file}. To use it: attach(model, images, "ssp", ')
    print(f"regions={str(file)!r}), SegmentationPrior(parser={str(file)!r}), or --parser {file}.")


def table_of(runs: dict[str, list[list[float]]]) -> str:
    """Put the mean of each region, and its deviation over the seeds, into a table."""
    lines = [f"| IoU % | {' | '.join(runs)} |", f"|---|{'--:|' * len(runs)}"]
    for number, name in enumerate((*REGIONS, "average")):
        cells = []
        for found in runs.values():
            values = [100 * (mean(one) if number == len(REGIONS) else one[number]) for one in found]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
