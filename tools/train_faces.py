"""Trains the embedded classifier of the library: `python tools/train_faces.py`.

It learns the attributes of the procedural faces, and the recipe `gradcam-iou` guides it by one region for
each attribute. Training takes some minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.guiding.guide import Guide
from attnguide.models import EMBEDDED, write_embedded
from attnguide.models.networks import small_cnn
from attnguide.priors.mask import MaskPrior

SIZE, WIDTH, REDUCTION = 64, 24, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=EMBEDDED, show_default=True, help="The file to write."
)
@click.option("--faces", default=8000, show_default=True, help="Number of faces to train on.")
@click.option("--epochs", default=10, show_default=True, help="Passes over the faces.")
@click.option("--weight", default=0.1, show_default=True, help="λ of the guidance.")
def main(out: Path, faces: int, epochs: int, weight: float) -> None:
    """Train, print the accuracy on unseen faces, and save."""
    console = Console()
    torch.manual_seed(0)
    images, labels = _draw(faces, seed=7)
    model = small_cnn(len(ATTRIBUTES), width=WIDTH, reduction=REDUCTION).to(memory_format=torch.channels_last)
    regions = torch.stack([template(name, SIZE) for name in ATTRIBUTES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-3)
    steps = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(faces), 64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(steps))
    model.train()
    with Guide.from_recipe(model, "gradcam-iou", prior=MaskPrior(regions), weight=weight) as guide:
        for chosen in track(steps, "training", console=console):
            batch, truth = images[chosen], labels[chosen]
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)  # the regions are symmetric
            loss = F.binary_cross_entropy_with_logits(model(batch), truth) + guide.loss(truth)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    unseen, truth = _draw(1000, seed=8)
    with torch.no_grad():
        accuracy = ((model(unseen) > 0) == (truth > 0.5)).float().mean(0)
    for name, value in zip(ATTRIBUTES, accuracy.tolist(), strict=True):
        console.print(f"{name:15} {value:.1%}")
    about = {
        "classes": ATTRIBUTES,
        "size": SIZE,
        "width": WIDTH,
        "reduction": REDUCTION,
        "mean": MEAN,
        "std": STD,
    }
    write_embedded(out, model, **about)  # type: ignore[arg-type]
    console.print(f"mean {float(accuracy.mean()):.1%}; saved to {out}, {out.stat().st_size / 1024:.0f} KiB")


def _draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    batch = ProceduralFaces(count, size=SIZE, seed=seed, pose=2.0).stack()
    images = (batch.image.as_subclass(Tensor) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    return images.contiguous(memory_format=torch.channels_last), batch.attributes


if __name__ == "__main__":
    main()
