"""SSP and SSG compared with other methods, and parsing with and without attributes, on drawn faces.

    python benchmarks/attributes.py                        # everything: two hours on a small machine
    python benchmarks/attributes.py --parts parsing
    python benchmarks/attributes.py --summary attributes

Runs `examples/celeba_attributes.py` (Table 2 of CVPR 2017) and `examples/face_parsing.py` (Table 4), three
seeds each. The faces, the network and how long it is trained were fixed with average pooling alone, on faces
of another seed; parsing without attributes likewise.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from attnguide_segmentation.attributes import attribute_table
from attnguide_segmentation.metrics import right_regions
from attnguide_segmentation.regions import REGIONS
from running import run_example

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"
SETTINGS = {
    "attributes": (
        "celeba_attributes.py",
        *("--faces", "600", "--width", "12", "--iterations", "300", "--rate", "1e-3", "--seeds", "3"),
    ),
    "places": ("where_ssp_looks.py", "--seeds", "3"),
    "parsing": ("face_parsing.py", "--seeds", "3"),
}
#: Table 2, on pre-cropped CelebA, in per cent: classification error, average precision, balanced accuracy.
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "average pooling": (9.14, 79.74, 86.73),
    "SPPNet*": (9.49, 77.69, None),
    "naive": (9.13, 79.74, None),
    "BBox": (8.76, 79.95, None),
    "SSG": (8.38, 80.55, 87.82),
    "SSP": (8.33, 81.02, 88.24),
    "SSP + SSG": (8.20, 81.45, None),
}
#: Table 4, in per cent: intersection over union on Helen, without and with the attributes of CelebA.
PUBLISHED_IOU = {
    "background": (89.25, 89.64), "hair": (47.56, 48.32), "face_skin": (78.65, 79.92), "eyes": (46.83, 56.33),
    "eyebrows": (31.22, 42.25), "mouth": (62.03, 65.42), "nose": (77.40, 77.74), "average": (61.84, 65.66),
}  # fmt: skip


def run(part: str) -> None:
    """Run an example; keep its result, and put its pictures into the documentation."""
    script, *settings = SETTINGS[part]
    run_example(script, settings, RESULTS / f"{part}.json", pictures=IMAGES / part)


def read(part: str) -> Any:
    return json.loads((RESULTS / f"{part}.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def average(values: list[float]) -> float:
    """Mean over the attributes for which there is a value."""
    return mean(value for value in values if not math.isnan(value))


def attributes() -> str:
    """Return table 2: our results and the published ones."""
    runs = read("attributes")["runs"]
    measures = list(runs[0]["SSP"])
    heads = [f"{what}, %" for what in measures] + ["gain in average precision"]
    lines = [
        f"| | {' | '.join(heads)} | published: {' | published: '.join(measures)} |",
        f"|---|{'--:|' * (len(heads) + len(measures))}",
    ]
    for name in PUBLISHED:
        cells = [spread([average(found[name][what]) for found in runs]) for what in measures]
        gains = [
            average(found[name]["average precision"]) - average(found["average pooling"]["average precision"])
            for found in runs
        ]
        cells.append("" if name == "average pooling" else spread(gains))
        cells += ["" if value is None else f"{value:.2f}" for value in PUBLISHED[name]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def places() -> str:
    """Where SSP looks, for each attribute: the region that counts most, on average over the seeds."""
    result = read("places")
    table = attribute_table(result["classes"])
    weights = torch.tensor([run["weights"] for run in result["runs"]])
    precision = torch.tensor([run["average precision"] for run in result["runs"]]).mean(dim=0)
    lines = [
        "| attribute | region that counts most | its weight | regions that show it | average precision, % |",
        "|---|---|--:|---|--:|",
    ]
    for number, name in enumerate(result["classes"]):
        means = weights[:, :, number].mean(dim=0)
        most = int(means.argmax())
        shown = [region.replace("_", " ") for region, has in zip(REGIONS, table[number], strict=True) if has]
        found = f"{REGIONS[most].replace('_', ' ')} | {means[most]:.2f}"
        lines.append(f"| {name} | {found} | {', '.join(shown)} | {100 * precision[number]:.1f} |")
    lines.append(f"\nA region that shows the attribute counts most for {right(weights, table)}.")
    last = torch.tensor(read("attributes")["weights"])
    lines.append(f"In the networks of the table above, which read the last layer: for {right(last, table)}.")
    return "\n".join(lines)


def right(weights: torch.Tensor, table: torch.Tensor) -> str:
    """For how many attributes the right region counts most, over seeds."""
    shares = [float(right_regions(one, table).nanmean()) for one in weights]
    return f"{spread(shares)} % of the attributes that a region of the face shows"


def parsing() -> str:
    """Return table 4: our results and the published ones."""
    runs = read("parsing")["runs"]
    lines = [
        f"| IoU, % | {' | '.join(runs)} | published: {' | published: '.join(runs)} |",
        "|---|--:|--:|--:|--:|",
    ]
    for number, (name, published) in enumerate(PUBLISHED_IOU.items()):
        cells = [
            spread([mean(one) if name == "average" else one[number] for one in found])
            for found in runs.values()
        ]
        cells += [f"{value:.2f}" for value in published]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


SUMMARIES = {"attributes": attributes, "places": places, "parsing": parsing}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--summary", choices=list(SUMMARIES), help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        print(SUMMARIES[options.summary]())
        return
    for part in options.parts:
        run(part)


if __name__ == "__main__":
    main()
