"""What can be read of the surroundings at the positions of the object itself, layer by layer?

    python benchmarks/surroundings.py --data waterbirds/

Birds get the backgrounds of other photographs, on land or on water, so that the bird says nothing about the
place. Then a linear classifier reads the place from the features of a pretrained network at the bird's own
positions alone. What it can read there, the network can too, and no map of that layer shows it: 50 % is
chance. Printed, and saved as `results/surroundings.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from attnguide import functional
from attnguide.layers import find_layers, reach
from attnguide.masks import SwapOutside
from tasks import Frozen, Part, birds, pretrained_network

RESULT = Path(__file__).parent / "results" / "surroundings.json"
#: A position counts as the bird's own if the mask covers this share of it.
INSIDE = 0.9


def exchanged(part: Part, seed: int) -> tuple[Tensor, Tensor]:
    """Images with the background of others, and the place, 0 or 1, that it shows."""
    assert part.groups is not None
    swapped = SwapOutside("any")(
        part.images, part.labels, part.masks, generator=torch.Generator().manual_seed(seed)
    )
    return swapped.images, part.groups[swapped.partner] % 2


@torch.no_grad()
def inside(network: Frozen, images: Tensor, masks: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each block its mean feature over the bird's own positions, and whether there are any."""
    names = ["model.conv_stem", *(f"model.blocks.{number}" for number in range(7))]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for some, regions in zip(images.split(32), masks.split(32), strict=True):
        network(some)
        for name, output in outputs.items():
            covered = functional.resize(regions, (output.shape[2], output.shape[3]))
            own = (covered >= INSIDE).to(output)[:, None]
            number = own.sum(dim=(1, 2, 3))
            mean = (output * own).sum(dim=(2, 3)) / number.clamp(min=1)[:, None]
            found[name].append((mean, number > 0))
    for handle in handles:
        handle.remove()
    return {name: (torch.cat([m for m, _ in f]), torch.cat([o for _, o in f])) for name, f in found.items()}


def summary() -> str:
    """What was found, as a table."""
    lines = [
        "| layer | a position sees, % of the image | place read inside the bird, % | images |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['layer']}` | {100 * row['sees']:.1f} | {100 * row['place_read']:.1f} | {row['images']} |"
        for row in json.loads(RESULT.read_text(encoding="utf-8"))
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of birds, with metadata.csv")
    parser.add_argument("--summary", action="store_true", help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    if options.data is None:
        parser.error("--data is needed: the folder of birds, with metadata.csv")
    data = options.data
    network = pretrained_network().eval()
    train, _, test = birds(data, 0, False)
    images, places = exchanged(train, 0)
    tested, their_places = exchanged(test, 1)
    features, theirs = inside(network, images, train.masks), inside(network, tested, test.masks)
    seen = reach(network, test.images[:16], find_layers(network, test.images[:2], list(features)))
    rows: list[dict[str, Any]] = []
    for name, (feature, own) in features.items():
        other, there = theirs[name]
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        reader.fit(feature[own].numpy(), places[own].numpy())
        right = reader.score(other[there].numpy(), their_places[there].numpy())
        row = {"layer": name.removeprefix("model."), "sees": round(seen[name], 4)}
        rows.append({**row, "place_read": round(float(right), 4), "images": int(there.sum())})
        print(rows[-1], flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
