"""What heat maps of action units cost: by themselves, and on the fly in a training step.

    python benchmarks/action_units.py            # writes results/action_units.json and prints a table
    python benchmarks/action_units.py --quick    # a small model, nothing written

The step is that of a resnet50 on 32 faces of 112 pixels; a plain one and a guided one are alternated, so that
a ratio compares steps of the same minute. Faces are drawn, weights random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide_action_units.prior import ActionUnitPrior
from measuring import Call, alternate, compared, describe, machine

RESULTS = Path(__file__).parent / "results" / "action_units.json"


def steps(name: str, faces: Any, device: torch.device) -> dict[str, Call]:
    """A plain step, another one to see the noise, and a guided one, each with a separate model."""

    def make(guided: bool) -> Call:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7).to(device).train()
        guide = ag.Guide.from_recipe(model, "au-codebook") if guided else None
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step() -> None:
            loss = F.cross_entropy(model(faces.image), faces.expression)
            if guide is not None:
                loss = loss + guide.loss(faces.expression, landmarks=faces.landmarks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {"plain": make(False), "plain again": make(False), "guided": make(True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
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
    name, batch, maps, rounds = "resnet50", 32, 1024, options.rounds
    if options.quick:
        name, batch, maps, rounds = "test_resnet", 4, 64, 2
    drawn = ProceduralFaces(batch, 112).stack()
    faces = type(drawn)(*(part.as_subclass(Tensor).to(device) for part in drawn))
    prior = ActionUnitPrior()
    points = faces.landmarks.repeat(maps // batch, 1, 1)
    labels = 1 + torch.arange(maps, device=device) % 6  # all expressions but neutral

    def draw() -> object:
        return prior.draw(points, labels, (112, 112), (112, 112))

    draw()
    seconds = sorted(alternate({"maps": draw}, device, max(5, rounds), 30)["maps"])
    found = compared(alternate(steps(name, faces, device), device, rounds, 0), "plain")
    record = {
        **machine(device),
        "torch": torch.__version__,
        "maps": {"count": maps, "size": 112, "seconds": seconds[len(seconds) // 2]},
        "step": {"model": name, "batch": batch, "ways": found},
    }
    print(table(record))
    if not options.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    step, maps = record["step"], record["maps"]
    ratios = {
        way: f"{found['ratio']:.2f} ({found['quartiles'][0]:.2f}–{found['quartiles'][1]:.2f})"
        for way, found in step["ways"].items()
    }
    lines = [
        "| what | measured |",
        "| --- | --: |",
        f"| {maps['count']} maps of {maps['size']}×{maps['size']} | {maps['seconds']:.2f} s |",
        f"| plain step, {step['model']}, batch {step['batch']} | {step['ways']['plain']['seconds']:.2f} s |",
        f"| plain step again | {ratios['plain again']} |",
        f"| guided step | {ratios['guided']} |",
    ]
    return "\n".join(lines) + f"\n\n{describe(record)}."


if __name__ == "__main__":
    main()
