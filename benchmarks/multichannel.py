"""Multi-channel attention: accuracy, structure, places, pruning, and what a step costs.

    python benchmarks/multichannel.py                     # three seeds, an hour on one core; then the cost
    python benchmarks/multichannel.py --seeds 1           # one of them
    python benchmarks/multichannel.py --seeds --cost      # the cost alone
    python benchmarks/multichannel.py --masks 0 1 2       # shared and full masks, on fewer faces, these seeds
    python benchmarks/multichannel.py --summary accuracy  # runs nothing, prints what was found

The rest is the example of multi-channel attention, on drawn faces, with its defaults. The cost is that of a
resnet18 on 32 images of 112 pixels with 40 attributes, as it is, and with a last stage of 7×7 positions; the
plain step and the other are alternated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from attnguide.data.procedural.faces import ATTRIBUTES
from attnguide_multichannel.adapted import attach
from measuring import Call, alternate, compared, describe, machine, peak_bytes
from running import run_example

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "multichannel"
COST = RESULTS / "cost.json"
#: Size of the comparison of masks: the rest is as in the example.
COMPARED = ("--faces", "600", "--width", "8")


# ------------------------------------------------------------------------------ cost


def step(grid: int, adapted: bool, device: torch.device, batch: int, classes: int = 40) -> tuple[Call, int]:
    """A training step, and the bytes of model and images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=classes).to(device).train()
    if grid == 7:  # as on images of 224 pixels
        for module in (model.layer4[0].conv1, model.layer4[0].downsample[0]):
            module.stride = (1, 1)
    images = torch.rand(batch, 3, 112, 112, device=device)
    labels = (torch.rand(batch, classes, device=device) < 0.5).float()
    guide = attach(model, images[:2]) if adapted else None
    weights: list[nn.Parameter] = [*model.parameters(), *([] if guide is None else guide.parameters())]
    optimizer = torch.optim.SGD(weights, lr=1e-4)

    def call() -> None:
        loss = F.binary_cross_entropy_with_logits(model(images), labels)
        if guide is not None:
            loss = loss + guide.loss(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call, sum(t.nbytes for t in (*weights, images))


def cost(device: torch.device, rounds: int, batch: int = 32) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for grid in (4, 7):
        ways = {"plain": False, "plain again": False, "multi-channel attention": True}
        calls = {way: step(grid, adapted, device, batch)[0] for way, adapted in ways.items()}
        times = compared(alternate(calls, device, rounds, 60), "plain")
        peaks = {
            way: peak_bytes(lambda adapted=adapted, grid=grid: step(grid, adapted, device, batch), device)[
                "total"
            ]
            for way, adapted in ways.items()
        }
        found[str(grid)] = {"times": times, "memory": {way: peaks[way] / peaks["plain"] for way in ways}}
    return {**machine(device), "grids": found}


def cost_table() -> str:
    record = json.loads(COST.read_text())
    lines = ["| last stage | way | step | peak memory |", "|---|---|--:|--:|"]
    for grid, found in record["grids"].items():
        for way, time in found["times"].items():
            low, high = time["quartiles"]
            ratio = f"{1000 * time['seconds']:.0f} ms" if way == "plain" else f"{time['ratio']:.2f}"
            spread = "" if way == "plain" else f" ({low:.2f}–{high:.2f})"
            lines.append(f"| {grid}×{grid} | {way} | {ratio}{spread} | {found['memory'][way]:.2f} |")
    return "\n".join(lines) + f"\n\n{describe(record)}."


# --------------------------------------------------------------------------- summaries


def runs() -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob("seed*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def spread(values: list[float], scale: float = 100, digits: int = 1) -> str:
    found = f"{scale * mean(values):.{digits}f}"
    return found + (f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else "")


def accuracy() -> str:
    found = runs()
    ways = list(found[0]["accuracy"])
    lines = [f"| accuracy, % | {' | '.join(ways)} |", f"|---|{'--:|' * len(ways)}"]
    for number, name in enumerate(ATTRIBUTES):
        cells = [spread([run["accuracy"][way][number] for run in found]) for way in ways]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [spread([mean(run["accuracy"][way]) for run in found], digits=2) for way in ways]
    return "\n".join([*lines, f"| average | {' | '.join(cells)} |"])


def structure() -> str:
    found = runs()
    kinds = {
        "one place": "of one place",
        "together": "appear together",
        "either": "either",
        "neither": "neither",
    }
    lines = [f"| faces | alike by | {' | '.join(kinds.values())} |", f"|---|---|{'--:|' * len(kinds)}"]
    for faces in ("independent", "together"):
        for by in ("masks", "scores", "both"):
            cells = [
                spread([run["structure"][faces][by][kind] for run in found], digits=0)
                if kind in found[0]["structure"][faces][by]
                else ""
                for kind in kinds
            ]
            lines.append(f"| attributes {faces} | {by} | {' | '.join(cells)} |")
    return "\n".join(lines)


def energy() -> str:
    found = runs()
    columns = [(way, kind) for way in ("free", "guided") for kind in ("place", "region")]
    lines = [
        f"| attribute | {' | '.join(f'{way}, in its {kind}' for way, kind in columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    values = {key: [run["energy"][key[0]][key[1]] for run in found] for key in columns}
    for number, name in enumerate(ATTRIBUTES):
        cells = [spread([one[number] for one in values[key]], 1) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [spread([mean(one) for one in values[key]], 1) for key in columns]
    return "\n".join([*lines, f"| average | {' | '.join(cells)} |"])


def pruning() -> str:
    found = runs()
    rows = found[0]["pruning"]
    rankings = list(dict.fromkeys(row["ranking"] for row in rows))
    columns = [(when, name) for when in ("at once", "accuracy") for name in rankings]
    heads = [f"{'at once' if when == 'at once' else 'after an epoch'}, {name}" for when, name in columns]
    lines = [
        f"| channels removed | {' | '.join(heads)} | MFLOPs | time |",
        f"|--:|{'--:|' * (len(heads) + 2)}",
    ]
    for share in dict.fromkeys(row["share"] for row in rows):
        same = [row for run in found for row in run["pruning"] if row["share"] == share]
        cells = [spread([row[when] for row in same if row["ranking"] == name]) for when, name in columns]
        cells.append(f"{mean(row['flops'] for row in same) / 1e6:.1f}")
        cells.append(f"{mean(row['time'] for row in same):.2f}")
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def transformed() -> str:
    found = runs()
    names = {
        "noise": "noise",
        "noise, emphasised": "noise, important channels emphasised",
        "apart": "attributes learned together, apart",
        "apart, suppressed": "apart, the partner's channels suppressed",
    }
    lines = ["| faces | accuracy, % |", "|---|--:|"]
    return "\n".join(
        lines
        + [
            f"| {text} | {spread([run['transformed'][key] for run in found])} |"
            for key, text in names.items()
        ]
    )


def masks() -> str:
    """Shared and full masks: accuracy, structure, places, how free they are, and what they cost."""
    files = sorted(RESULTS.glob("masks*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    kinds = ("shared", "full")
    rows: dict[str, tuple[Callable[[dict[str, Any]], float], float, int]] = {
        "accuracy, %": (lambda one: mean(one["accuracy"]), 100, 1),
        **{
            f"partner {kind}, by {by}, %": (
                lambda one, by=by, key=key: one["structure"][by][key],  # type: ignore[misc]
                100,
                0,
            )
            for by in ("masks", "both")
            for key, kind in (("one place", "of one place"), ("neither", "of neither"))
        },
        "energy in its place": (lambda one: mean(one["energy"]), 1, 1),
        "rank": (lambda one: one["rank"], 1, 0),
        "singular values that hold 99 %": (lambda one: one["99 %"], 1, 0),
        "full masks with a mean below 0.1, %": (lambda one: one["closed"], 100, 0),
        "weights, thousands": (lambda one: one["parameters"] / 1000, 1, 1),
        "time of the training, CPU seconds": (lambda one: one["seconds"], 1, 0),
    }
    lines = ["| | shared | full | difference |", "|---|--:|--:|--:|"]
    for name, (value, scale, digits) in rows.items():
        values = {kind: [value(run[kind]) for run in found] for kind in kinds}
        values["difference"] = [a - b for a, b in zip(values["full"], values["shared"], strict=True)]
        cells = [spread(each, scale, digits) for each in values.values()]
        if name.startswith("full masks"):  # shared ones sum to 1
            cells = ["", cells[1], ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


SUMMARIES = {
    "accuracy": accuracy,
    "structure": structure,
    "energy": energy,
    "pruning": pruning,
    "transformed": transformed,
    "cost": cost_table,
    "masks": masks,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    parser.add_argument("--masks", type=int, nargs="+", help="compare both kinds of masks alone, these seeds")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the cost of a small batch, nothing written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--summary", choices=list(SUMMARIES), help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        print(SUMMARIES[options.summary]())
        return
    if options.quick:
        print(json.dumps(cost(torch.device(options.device), 5, batch=2)))
        return
    for seed in options.masks or ():
        settings = ["--compare-masks", *COMPARED, "--seed", str(seed)]
        run_example("celeba_multichannel.py", settings, RESULTS / f"masks{seed}.json")
    if options.masks is not None:
        return
    for seed in range(3) if options.seeds is None else options.seeds:
        run_example("celeba_multichannel.py", ["--seed", str(seed)], RESULTS / f"seed{seed}.json")
    if options.cost or options.seeds is None:
        COST.parent.mkdir(parents=True, exist_ok=True)
        COST.write_text(json.dumps(cost(torch.device(options.device), options.rounds), indent=1) + "\n")


if __name__ == "__main__":
    main()
