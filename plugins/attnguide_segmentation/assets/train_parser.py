"""Trains the parser that comes along: `python -m attnguide_segmentation.assets.train_parser`.

It learns from drawn faces, in light of any colour, shifted, turned and scaled. Takes ten
minutes.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attnguide.data.faces import ProceduralFaces
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.parser import EMBEDDED, Parser, save_parser, standardised
from attnguide_segmentation.parsing import ParsingNetwork, parsing_loss
from attnguide_segmentation.regions import REGIONS, merged

SIZE = 96


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=EMBEDDED, show_default=True, help="The file to write."
)
@click.option("--faces", default=2400, show_default=True, help="Number of faces to train on.")
@click.option("--epochs", default=8, show_default=True)
@click.option(
    "--width", default=12, show_default=True, help="Channels of the first block; 64 in the publication."
)
def main(out: Path, faces: int, epochs: int, width: int) -> None:
    """Train, print the overlap on unseen faces, and save."""
    console = Console()
    torch.manual_seed(0)
    images, labels = drawn(faces, seed=17)
    network = ParsingNetwork(width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-3)
    steps = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(faces), 32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(steps))
    network.train()
    for chosen in track(steps, "training", console=console):
        batch, truth = augmented(images[chosen].float() / 255, labels[chosen])
        loss = parsing_loss(network(standardised(batch)), truth)
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
    """Flip, turn, scale and shift each face, and change the colour and the contrast of its light."""
    count = len(images)
    angle, scale = 0.5 * (torch.rand(count) - 0.5), 1 + 0.4 * (torch.rand(count) - 0.5)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    turn = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], dim=1).view(
        -1, 2, 2
    )
    shift = 0.3 * (torch.rand(count, 2) - 0.5)
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
