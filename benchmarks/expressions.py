"""Does guidance towards action units help with expressions? Runs `examples/fer.py`, or shows its results.

    python benchmarks/expressions.py                    # the drawn faces: hours on a small machine
    python benchmarks/expressions.py --data ROOT        # photographs, with a table and identities
    python benchmarks/expressions.py --ablation         # layers and λ, on drawn faces of other seeds
    python benchmarks/expressions.py --data ROOT --ablation
    python benchmarks/expressions.py --summary photographs

Settings of resnet18 were chosen on drawn faces of other seeds; the transformer's are the same but for a lower
rate. λ is the published one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from running import run_example

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "expressions"

#: What the example is given, for each model and kind of faces.
MODELS = {"resnet18": ["--rate", "1e-3"], "vit_tiny_patch16_224": ["--rate", "5e-4"]}
EPOCHS = {"photographs": "12", "drawn": "8"}
#: Which layers and weights are compared, one after the other.
ABLATION = (
    "--model resnet18 --size 48 --epochs 8 --folds 3 --seed 100 --layers stage:-2 auto --weights 1 9 27"
)
ABLATED_FACES: dict[str, list[str]] = {"photographs": [], "drawn": ["--faces", "400"]}
FACES = {"photographs": ["--folds", "5"], "drawn": ["--folds", "3", "--faces", "1600"]}


def run(kind: str, model: str, data: Path | None) -> None:
    """Run the example with a model, and keep its result."""
    settings = ["--model", model, "--size", "48", "--epochs", EPOCHS[kind], *MODELS[model]]
    keep([*settings, *FACES[kind]], data, f"{kind}-{model}")


def keep(settings: Sequence[str], data: Path | None, name: str) -> None:
    """Run the example, and keep its result."""
    if data is not None:
        settings = [*settings, "--data", str(data)]
    run_example("fer.py", settings, RESULTS / f"{name}.json")


def ablation(name: str) -> str:
    """One table: a column for each layer and λ."""
    runs = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    lines = [f"| | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}"]
    for row in runs["unguided"][0]:
        columns = [[one[row] for one in found] for found in runs.values()]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(kind: str) -> str:
    """One table for all models that were run on these faces."""
    columns: dict[str, dict[str, str]] = {}
    for model in MODELS:
        file = RESULTS / f"{kind}-{model}.json"
        if not file.exists():
            continue
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        for way, found in zip(("unguided", "guided"), runs.values(), strict=True):
            # The name of the layer is the model's own business.
            cells = columns.setdefault(f"{model.split('_patch')[0]}, {way}", {})
            for name in found[0]:
                values = [one[name] for one in found]
                row = "ATT-COS" if name.startswith("ATT-COS") else name
                cells[row] = f"{mean(values):.3f} ± {stdev(values):.3f}"
    rows = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {row} | {' | '.join(cells[row] for cells in columns.values())} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of photographs for examples/fer.py")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ablation", action="store_true", help="compare layers and weights")
    tables = [*FACES, *(f"ablation-{kind}" for kind in FACES)]
    parser.add_argument("--summary", choices=tables, help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        show = ablation if options.summary.startswith("ablation") else summary
        print(show(options.summary))
        return
    kind = "drawn" if options.data is None else "photographs"
    if options.ablation:
        keep([*ABLATION.split(), *ABLATED_FACES[kind]], options.data, f"ablation-{kind}")
        return
    for model in options.models:
        run(kind, model, options.data)


if __name__ == "__main__":
    main()
