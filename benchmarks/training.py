"""What the loop of `attnguide train` costs beside the same loop written by hand.

    python benchmarks/training.py --out benchmarks/results/training.json
    python benchmarks/training.py --summary

Both read the same pictures, in the same order and with the same variation, and make the same steps of a
network on them: an epoch of each, by turns. Ratios are those of one round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import attnguide as ag
from attnguide import models
from attnguide.data import read_image
from attnguide.evaluation import mask_reader
from attnguide.masks import read_mask
from attnguide.training import AugmentSettings, Images, Loader, Sample, Trainer, accelerator_on
from measuring import alternate, compared, describe, machine

RESULTS = Path(__file__).parent / "results" / "training.json"
METHODS = ("unguided", "guide", "intervention")


def draw(root: Path, count: int, side: int) -> list[Sample]:
    """Write noise with masks."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        label, name = number % 2, f"{number}.png"
        for folder in ("photos", "masks"):
            (root / folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            root / "photos" / str(label) / name
        )
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2, side // 4 : side // 2] = 255
        Image.fromarray(mask).save(root / "masks" / str(label) / name)
        samples.append(Sample(root / "photos" / str(label) / name, label))
    return samples


class ByHand(Dataset[tuple[Tensor, int, Tensor]]):
    """Pictures with masks, as one writes it for a training of one's own."""

    def __init__(self, samples: list[Sample], masks: Path, loaded: models.LoadedModel) -> None:
        self.samples, self.masks = samples, masks
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    list(loaded.size),
                    scale=(0.7, 1.0),
                    interpolation=v2.InterpolationMode.BICUBIC,
                    antialias=True,
                ),
                v2.RandomHorizontalFlip(0.5),
                v2.ToImage(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(list(loaded.mean), list(loaded.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        sample = self.samples[index]
        mask = tv_tensors.Mask(read_mask(self.masks / str(sample.label) / sample.path.name))
        image, mask = self.transform(read_image(sample.path), mask)
        return image, int(sample.label), mask  # type: ignore[arg-type]


def epochs(
    name: str, method: str, root: Path, samples: list[Sample], batch: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return an epoch by hand and one of the engine, each with a network of its own."""
    loaded = models.load(name, num_classes=2)
    reader = mask_reader(root / "masks", ("0", "1"))
    networks = [timm.create_model(name, num_classes=2).to(device).train() for _ in range(2)]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-4) for network in networks]
    guides = [ag.Guide(n, loss="outside") if method == "guide" else None for n in networks]
    interventions = [ag.Intervention(n) if method == "intervention" else None for n in networks]
    trainer = Trainer(networks[1], optimizers[1], accelerator_on(device, "no"), guides[1] or interventions[1])
    loader = Loader(Images(samples, loaded, mask_for=reader, augment=AugmentSettings()), batch, seed=0)
    plain = DataLoader(ByHand(samples, root / "masks", loaded), batch, shuffle=True)
    network, optimizer, guide, intervention = networks[0], optimizers[0], guides[0], interventions[0]

    def by_hand() -> None:
        total = 0.0
        for images, labels, masks in plain:
            images, labels, masks = images.to(device), labels.to(device), masks.to(device)
            if intervention is not None:
                both = intervention(images, labels, mask=masks)
                loss = F.cross_entropy(both.swapped, labels) + both.loss
            else:
                loss = F.cross_entropy(network(images), labels)
            if guide is not None:
                loss = loss + guide.loss(labels, mask=masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    def engine() -> None:
        for parts in loader.epoch(0):
            trainer.step(parts)
        trainer.finish_epoch()

    return {"by hand": by_hand, "attnguide train": engine}


def summary() -> str:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| method | ratio to the loop by hand | quartiles |", "|---|--:|--:|"]
    for method in METHODS:
        found = record[method]["attnguide train"]
        low, high = found["quartiles"]
        lines.append(f"| {method} | {found['ratio']:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines) + f"\n\n{describe(record)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet18", help="a model of timm")
    add("--images", type=int, default=32)
    add("--batch", type=int, default=16)
    add("--side", type=int, default=256, help="side of the pictures, in pixels")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=60, help="budget of each method")
    add("--device", default="cpu")
    add("--out", type=Path, help="JSON file to write")
    add("--summary", action="store_true", help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    torch.set_num_threads(1)
    device = torch.device(options.device)
    record = machine(device)
    with tempfile.TemporaryDirectory() as folder:
        samples = draw(Path(folder), options.images, options.side)
        for method in options.methods:
            calls = epochs(options.model, method, Path(folder), samples, options.batch, device)
            found = compared(alternate(calls, device, options.rounds, options.seconds), "by hand")
            record[method] = found
            print(method, json.dumps(found["attnguide train"]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
