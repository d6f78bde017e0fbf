"""Which region of the face shows an attribute? SSP finds out, from nothing but the attributes.

SSP predicts from each region separately, and learns how to weight the predictions (see the recipe of
segmentation). The weights show a place on two conditions: a position of the layer must not see the whole
face, and regions must start on equal terms. So a layer is used here whose positions see 24 of the 96 pixels,
with `normalize=True`. It learns from drawn faces with attributes that are rare, and prints how much each
region counts for each attribute, on average over other faces that have it; and it writes `result.json` and
`weights.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces
from attnguide.metrics import average_precision
from attnguide_segmentation.adapted import RegionAdapters, attach
from attnguide_segmentation.attributes import attribute_table
from attnguide_segmentation.figures import region_weights, weights_figure
from attnguide_segmentation.metrics import right_regions
from attnguide_segmentation.network import attribute_network
from attnguide_segmentation.parser import load_parser
from attnguide_segmentation.regions import REGIONS

#: How often the faces have an attribute: a long tail.
PREVALENCE = {
    "lipstick": 0.4, "heavy_makeup": 0.3, "smiling": 0.4, "mouth_open": 0.4, "eyeglasses": 0.08,
    "moustache": 0.06, "goatee": 0.06, "bushy_eyebrows": 0.15, "earrings": 0.12, "pale_skin": 0.1,
    "black_hair": 0.3, "blond_hair": 0.12, "brown_hair": 0.25, "bald": 0.04, "bangs": 0.15, "hat": 0.05,
}  # fmt: skip


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw faces: images in bytes, attributes, and the masks that the parser finds."""
    faces = ProceduralFaces(count, 96, seed=seed, prevalence=PREVALENCE).stack()
    images, parser = faces.image.as_subclass(Tensor), load_parser()
    masks = torch.cat([parser(part) for part in images.split(64)])
    return (images * 255).round().byte(), faces.attributes, (masks * 255).round().byte()


def inputs(images: Tensor, masks: Tensor, index: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the faces as the network takes them, some of them mirrored, and their masks."""
    mirror = mirror[:, None, None, None]
    chosen, regions = (images[index].float() / 255 - 0.5) / 0.25, masks[index].float() / 255
    return torch.where(mirror, chosen.flip(3), chosen), torch.where(mirror, regions.flip(3), regions)


def network(classes: int, width: int = 12) -> nn.Module:
    """Build the first five convolutions of the publication's network."""
    whole = attribute_network(classes, width=width)
    first = nn.Sequential(whole.block1, whole.pool1, whole.block2, whole.pool2, whole.block3[:3])
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def train(
    model: nn.Module, adapted: RegionAdapters, faces: tuple[Tensor, Tensor, Tensor], epochs: int
) -> None:
    """Train the model and its SSP on the attributes alone."""
    images, labels, masks = faces
    optimizer = torch.optim.AdamW([*model.parameters(), *adapted.parameters()], lr=5e-3)
    batches = [part for _ in range(epochs) for part in torch.randperm(len(images)).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches))
    model.train()
    for index in track(batches, "training", console=Console(stderr=True), transient=True):
        batch, regions = inputs(images, masks, index, torch.rand(len(index)) < 0.5)
        adapted.finder.give(regions)
        loss = F.binary_cross_entropy_with_logits(model(batch), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def look(
    model: nn.Module, adapted: RegionAdapters, faces: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Average precision `(K,)`, and how much regions count on faces that have the attribute, `(7, K)`."""
    images, labels, masks = faces
    model.eval()
    scores, weights = [], []
    for index in torch.arange(len(images)).split(64):
        batch, regions = inputs(images, masks, index, torch.zeros(len(index), dtype=torch.bool))
        adapted.finder.give(regions)
        with torch.no_grad():
            scores.append(model(batch))
        adapted.finder.give(regions)
        weights.append(region_weights(adapted, batch))
    have = labels[:, None] / labels.sum(dim=0).clamp(min=1)
    return average_precision(torch.cat(scores), labels), (torch.cat(weights) * have).sum(dim=0)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--faces", type=int, default=3000, help="number of faces to learn from")
    add("--epochs", type=int, default=12)
    add("--seed", type=int, default=0, help="the first one")
    add("--seeds", type=int, default=1, help="how many")
    add("--out", type=Path, default=Path("attnguide-regions"), help="folder for results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = attribute_table(ATTRIBUTES)
    runs, found = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        faces, unseen = drawn(options.faces, 2 * seed), drawn(600, 2 * seed + 1)
        torch.manual_seed(seed)
        model = network(len(ATTRIBUTES))
        adapted = attach(model, inputs(faces[0], faces[2], torch.arange(2), torch.zeros(2) > 0)[0], "ssp",
                         layer="0", normalize=True)  # fmt: skip
        train(model, adapted, faces, options.epochs)
        precision, weights = look(model, adapted, unseen)
        runs.append({"average precision": precision.tolist(), "weights": weights.tolist()})
        found.append(weights)
        print(f"seed {seed}: average precision {100 * float(precision.nanmean()):.1f} %", flush=True)
        for number, name in enumerate(ATTRIBUTES):
            best = int(weights[:, number].argmax())
            mark = "" if table[number, best] else "  (shown elsewhere)"
            print(f"  {name:15} {REGIONS[best]:10} {weights[best, number]:.2f}{mark}")
    right = mean(float(right_regions(weights, table).nanmean()) for weights in found)
    print(f"the right region counts most for {100 * right:.0f} % of the attributes that have one")
    settings = {key: str(value) for key, value in vars(options).items()}
    result: dict[str, Any] = {"settings": settings, "classes": ATTRIBUTES, "runs": runs}
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    weights_figure(torch.stack(found).mean(dim=0), ATTRIBUTES, options.out / "weights.png")


if __name__ == "__main__":
    main()
