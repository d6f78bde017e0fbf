"""Does accuracy on exchanged images choose λ well? What each λ reached in validation and in the test.

    python benchmarks/choosing.py --data mnist.npz --tasks decoy-cdep faces-lipstick --method hires_cam
    python benchmarks/choosing.py --summary

Validation images are those of the training's distribution, with the shortcut; test images are without it. The
tasks and methods are those of `effect.py`, with fewer images and epochs if so wished.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attnguide.metrics import SwappedAccuracy
from attnguide.training import Tried, choose_epoch, choose_weight
from effect import METHODS, Trainer, predicted
from tasks import TASKS, Part

RESULTS = Path(__file__).parent / "results" / "choosing.json"


def measure(
    task: str, method: str, weight: float, data: Path, images: int, epochs: int, seed: int
) -> dict[str, Any]:
    """Train with a λ, and measure after each epoch."""
    train, valid, test = TASKS[task].parts(data, seed, False)
    train = train.select(torch.arange(min(images, len(train))))
    valid = valid.select(torch.arange(min(1000, len(valid))))
    torch.manual_seed(seed)
    trainer = Trainer(METHODS[method if weight else "unguided"], TASKS[task], weight)
    metric = SwappedAccuracy(trainer.model)
    found: dict[str, list[float]] = {"swapped": [], "error": [], "test": []}
    for _ in range(epochs):
        trainer.model.train()
        for index in torch.randperm(len(train)).split(TASKS[task].batch):
            trainer.step(train.select(index))
        for index in torch.arange(len(valid)).split(500):
            part: Part = valid.select(index)
            metric.update(part.images, part.labels, part.masks)
        found["swapped"].append(float(metric.compute()))
        found["error"].append(float(metric.standard_error))
        metric.reset()
        found["test"].append(float((predicted(trainer.model, test) == test.labels).float().mean()))
    return {"task": task, "method": method, "weight": weight, "seed": seed, **found}


def chosen(records: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """The run and the epoch that validation chooses."""
    epochs = [choose_epoch(record["swapped"]) for record in records]
    tried = [Tried(r["weight"], r["swapped"][e], r["error"][e]) for r, e in zip(records, epochs, strict=True)]
    best = choose_weight(tried)
    number = next(n for n, each in enumerate(tried) if asdict(each) == asdict(best))
    return records[number], epochs[number]


def summary(records: list[dict[str, Any]]) -> str:
    """A line for each task, method and seed."""
    lines = [
        "| task | method | seed | λ: exchanged / test, % | chosen λ | its test | best of the grid |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for key in sorted({(r["task"], r["method"], r["seed"]) for r in records}):
        some = sorted(
            (r for r in records if (r["task"], r["method"], r["seed"]) == key), key=lambda r: r["weight"]
        )
        cells = []
        for r in some:
            epoch = choose_epoch(r["swapped"])
            cells.append(f"{r['weight']:g}: {100 * r['swapped'][epoch]:.1f} / {100 * r['test'][epoch]:.1f}")
        record, epoch = chosen(some)
        best = max(r["test"][choose_epoch(r["swapped"])] for r in some)
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {', '.join(cells)} | {record['weight']:g} | "
            f"{100 * record['test'][epoch]:.1f} | {100 * best:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="mnist.npz")
    add("--tasks", nargs="+", choices=list(TASKS), default=["decoy-cdep", "faces-lipstick"])
    add("--method", choices=list(METHODS), default="intervention")
    add("--weights", type=float, nargs="+", default=[0, 1, 10, 100])
    add("--images", type=int, default=4000, help="largest number of training images")
    add("--epochs", type=int, default=4)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--summary", action="store_true", help="run nothing, print what was found")
    options = parser.parse_args()
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    if not options.summary:
        torch.set_num_threads(1)
        for task, seed, weight in (
            (task, seed, weight)
            for task in options.tasks
            for seed in options.seeds
            for weight in options.weights
        ):
            key = {"task": task, "method": options.method, "weight": weight, "seed": seed}
            if any(key.items() <= record.items() for record in records):
                continue
            sizes = (options.data or Path(), options.images, options.epochs, seed)
            records.append(measure(task, options.method, weight, *sizes))
            RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(records[-1]), flush=True)
    print(summary(records))


if __name__ == "__main__":
    main()
