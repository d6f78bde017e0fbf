"""What SSP and SSG add to a training step, with masks that are there already.

    python benchmarks/regions.py            # writes results/regions.json and prints a table
    python benchmarks/regions.py --quick    # a small model, nothing written

The step is that of a resnet18 on 16 faces of 96 pixels; a plain one and the others are alternated, so that a
ratio compares steps of the same minute. Images are noise, regions are stripes, weights random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

from attnguide_segmentation.adapted import attach
from attnguide_segmentation.regions import as_masks
from measuring import Call, alternate, compared, describe, machine

RESULTS = Path(__file__).parent / "results" / "regions.json"
WAYS: dict[str, tuple[str, ...]] = {"plain": (), "plain again": (), "SSP": ("ssp",), "SSG": ("ssg",)}


def steps(name: str, batch: int, device: torch.device) -> dict[str, Call]:
    """A step for each way, each with a separate model."""
    images = torch.rand(batch, 3, 96, 96, device=device)
    labels = (torch.rand(batch, 16, device=device) < 0.5).float()
    masks = as_masks((torch.arange(96, device=device) * 7 // 96).expand(batch, 96, 96))

    def make(methods: tuple[str, ...]) -> Call:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, num_classes=16).to(device).train()
        adapted = attach(model, images[:2], *methods) if methods else None
        own = [] if adapted is None else list(adapted.parameters())
        optimizer = torch.optim.SGD([*model.parameters(), *own], lr=1e-4)

        def step() -> None:
            if adapted is not None:
                adapted.finder.give(masks)
            F.binary_cross_entropy_with_logits(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {way: make(methods) for way, methods in WAYS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--summary", action="store_true", help="run nothing, print what was measured")
    options = parser.parse_args()
    if options.summary:
        print(table(json.loads(RESULTS.read_text())))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name, batch, rounds = ("resnet18", 4, 2) if options.quick else ("resnet18", 16, options.rounds)
    found = compared(alternate(steps(name, batch, device), device, rounds, 60), "plain")
    record = {
        **machine(device),
        "torch": torch.__version__,
        "model": name,
        "batch": batch,
        "ways": found,
    }
    print(table(record))
    if not options.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    plain = record["ways"]["plain"]["seconds"]
    lines = [
        f"| step, {record['model']}, 96 px, batch {record['batch']} | measured |",
        "| --- | --: |",
        f"| plain | {1000 * plain:.0f} ms |",
    ]
    for way, found in record["ways"].items():
        if way != "plain":
            low, high = found["quartiles"]
            lines.append(f"| {way} | {found['ratio']:.2f} ({low:.2f}–{high:.2f}) |")
    return "\n".join(lines) + f"\n\n{describe(record)}."


if __name__ == "__main__":
    main()
