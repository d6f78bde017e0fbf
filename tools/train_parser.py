r"""Trains the embedded parser of attnguide_segmentation, in two and a half hours on one core.

    python tools/train_parser.py
    python tools/train_parser.py --start PARSER --seed 1 \
        --faces 8000 --epochs 4 --rate 1.5e-3 --balance 0.1

It learns from drawn faces, in light of any colour, shifted, turned and scaled. PARSER is the file that the
first command wrote; there small regions count more, so they are learned soon, and are found too large. The
second command was repeated four times with other seeds, each time from its last file, until little changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.parser import EMBEDDED, Parser, load_parser, save_parser, standardized
from attnguide_segmentation.parsing import ParsingNetwork, parsing_loss
from attnguide_segmentation.regions import REGIONS, merged

SIZE = 96


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=EMBEDDED, show_default=True, help="The file to write."
)
@click.option("--faces", default=5000, show_default=True, help="Number of faces to train on.")
@click.option("--epochs", default=16, show_default=True, help="Passes over the faces.")
@click.option(
    "--width", default=16, show_default=True, help="Channels of the first block; 64 in the publication."
)
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), help="Continue with these weights, of any width."
)
@click.option("--rate", default=4e-3, show_default=True, help="Highest learning rate.")
@click.option(
    "--balance", default=0.3, show_default=True, help="0: each pixel counts the same; 1: each region does."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the faces and their order.")
def main(
    out: Path, faces: int, epochs: int, width: int, start: Path | None, rate: float, balance: float, seed: int
) -> None:
    """Train, print the overlap on unseen faces, and save."""
    console = Console()
    torch.manual_seed(seed)
    images, labels = drawn(faces, seed=17 + 100 * seed)
    # Eyebrows are one pixel of 200, and would be learned last.
    share = torch.bincount(labels.flatten(), minlength=len(REGIONS)) / labels.numel()
    weight = share**-balance / (share ** (1 - balance)).sum()
    network = ParsingNetwork(width)
    if start is not None:
        network = cast(ParsingNetwork, load_parser(start).network).requires_grad_()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    steps = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(faces), 32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    network.train()
    for chosen in track(steps, "training", console=console):
        batch, truth = augmented(images[chosen].float() / 255, labels[chosen])
        loss = parsing_loss(network(standardized(batch)), truth, weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    parser = Parser(network, size=SIZE)
    unseen, truth = drawn(500, seed=18)
    found = torch.cat([parser(part.float() / 255).argmax(dim=1) for part in torch.split(unseen, 50)])
    overlap = region_iou(found, truth)
    for name, value in zip(REGIONS, overlap.tolist(), strict=True):
        console.print(f"{name:12} {value:.3f}")
    save_parser(out, parser)
    console.print(f"mean {float(overlap.mean()):.3f}; saved to {out}, {out.stat().st_size / 1024:.0f} KiB")


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw faces: images in bytes, which take a quarter of the memory, and regions."""
    faces = ProceduralFaces(count, SIZE, seed=seed, pose=2.0).stack()
    images = (faces.image.as_subclass(Tensor) * 255).round().byte()
    return images, merged(faces.segmentation.as_subclass(Tensor))


def augmented(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each face, turn, scale and shift half of them, and change the colour and contrast of the light."""
    count = len(images)
    # What moves is resampled, which blurs eyebrows of two pixels: some stay as they are.
    moves = (torch.rand(count) < 0.5).float()
    angle, scale = 0.3 * moves * (torch.rand(count) - 0.5), 1 + 0.2 * moves * (torch.rand(count) - 0.5)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    turn = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], dim=1).view(
        -1, 2, 2
    )
    shift = 0.15 * moves[:, None] * (torch.rand(count, 2) - 0.5)
    places = torch.cat([turn * scale[:, None, None], shift[..., None]], dim=2)
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    moved = F.grid_sample(
        labels[:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
    )
    gamma = torch.exp(torch.randn(count, 3, 1, 1) * 0.25)
    images = images.clamp(1e-3, 1) ** gamma + torch.randn_like(images) * 0.03 * torch.rand(count, 1, 1, 1)
    # A shadow that falls from one side.
    lean = torch.randn(count, 2, 1, 1) * 0.25
    axis = torch.linspace(-1, 1, images.shape[-1])
    return images * (1 + lean[:, :1] * axis + lean[:, 1:] * axis[:, None]).clamp(min=0.2), moved[:, 0].long()


if __name__ == "__main__":
    main()
