"""Multi-channel attention on facial attributes: accuracy, what is alike, where masks are, what it is for.

With `--data ROOT`, the folder that holds CelebA's folder `celeba`, it learns from photographs; without, from
drawn faces, which can say more: where each attribute is, and which appear together. It trains the same
network with a plain head and with multi-channel attention, in full and without its parts, and guided by
regions of the face; prunes it; and transforms its masks. It prints tables, and writes `result.json` and
`report.html`. `--masks full` does all this with masks that are computed each on its own, and
`--compare-masks` compares the two kinds of masks alone, on drawn faces.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import attnguide as ag
from attnguide.adapters import AdapterSet, trace_for
from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.errors import AttnGuideError
from attnguide.models.networks import small_cnn
from attnguide_multichannel.adapted import attach, multichannel_of
from attnguide_multichannel.analysis import Analysis, Likeness, analyze
from attnguide_multichannel.attention import Masks
from attnguide_multichannel.pruning import magnitude_ranking, prune
from attnguide_multichannel.report import write_report
from attnguide_multichannel.transform import emphasized, suppressed
from attnguide_segmentation.attributes import attribute_table
from attnguide_segmentation.parser import load_parser
from attnguide_segmentation.prior import SegmentationPrior
from attnguide_segmentation.regions import resized

#: What is trained: the adapter's settings; None for the plain head.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain head": None,
    "multi-channel attention": {},
    "without multi-label classifier": {"multi_label": 0.0},
    "without reconstructor": {"reconstruction": 0.0},
}
#: What the poster reports of CelebA's forty attributes, in the order of its files: accuracy in per cent.
POSTER = (
    92.85, 81.37, 80.71, 83.79, 98.30, 94.10, 70.14, 83.67, 88.39, 95.10, 95.33, 86.55, 91.87, 96.02, 96.68,
    98.67, 96.72, 97.89, 89.49, 86.77, 97.38, 93.67, 96.60, 86.38, 94.87, 73.33, 97.67, 75.62, 93.44, 94.67,
    97.65, 92.28, 81.60, 81.64, 84.61, 98.92, 92.52, 86.37, 96.30, 87.00,
)  # fmt: skip
#: Attributes of different places that appear together in the second set of drawn faces.
TOGETHER = {
    ("heavy_makeup", "earrings"): 0.92,
    ("eyeglasses", "goatee"): 0.92,
    ("lipstick", "pale_skin"): 0.92,
}
EQUAL = {name: 0.4 for pair in TOGETHER for name in pair}
SHARES = (0.1, 0.3, 0.5, 0.7)
_CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Faces:
    """Faces in memory.

    Attributes:
        images: Bytes `(N, 3, H, W)`.
        labels: `(N, K)`, 0 or 1.
        regions: Masks of the regions, bytes `(N, 7, h, w)`; None where they are not needed.
    """

    images: Tensor
    labels: Tensor
    regions: Tensor | None = None

    def batch(self, index: Tensor) -> Tensor:
        """Some images, as the network takes them."""
        return (self.images[index].float() / 255 - 0.5) / 0.25

    def first(self, count: int) -> Tensor:
        """The first images, as the network takes them."""
        return self.batch(torch.arange(min(count, len(self.images))))


# ------------------------------------------------------------------------------ data


def drawn(
    options: argparse.Namespace, count: int, seed: int, *, together: bool = False, regions: bool = True
) -> Faces:
    """Draw faces, whose attributes are independent, or appear together (then without regions)."""
    bias: dict[str, Any] = {"cooccurrence": TOGETHER, "prevalence": EQUAL} if together else {}
    faces = ProceduralFaces(count, options.size, seed=seed, **bias).stack()
    images = faces.image.as_subclass(Tensor)
    masks = None
    if regions and not together:
        parser = load_parser()
        parts = track(images.split(64), "finding regions", console=_CONSOLE, transient=True)
        masks = torch.cat([(parser(part) * 255).round().byte() for part in parts])
    return Faces((images * 255).round().byte(), faces.attributes, masks)


def photographs(options: argparse.Namespace, split: str) -> Faces:
    """Read CelebA, resized."""
    transform = v2.Compose([v2.PILToTensor(), v2.Resize([options.size, options.size], antialias=True)])
    data = CelebA(options.data, split, transform=transform)
    count = min(len(data), options.limit or len(data))
    shown = track(range(count), f"reading {split}", console=_CONSOLE, transient=True)
    images, labels = (torch.stack(part) for part in zip(*(data[index] for index in shown), strict=True))
    return Faces(images, labels)


# -------------------------------------------------------------------------- training


def backbone(options: argparse.Namespace, classes: int) -> nn.Module:
    """A network from random weights."""
    if options.data is None:
        return small_cnn(classes, width=options.width)
    model: nn.Module = timm.create_model(options.model, num_classes=classes)
    return model


def built(
    options: argparse.Namespace,
    faces: Faces,
    seed: int,
    settings: dict[str, Any] | None,
    classes: Sequence[str],
    *,
    guided: bool = False,
) -> tuple[nn.Module, AdapterSet | None]:
    """Build a network, and train it; all ways alike."""
    torch.manual_seed(seed)
    model = backbone(options, len(classes))
    adapted: AdapterSet | None = None
    if settings is not None:
        adapted = attach(model, faces.first(2), **{"masks": options.masks, **settings})
    if adapted is not None and guided:
        prior = SegmentationPrior(classes=classes)
        term = ag.Term("multichannel", prior, "iou", options.guidance, targets="all")
        train(model, ag.Guide(model, terms=[term], adapters=adapted), faces, options.epochs, options.rate)
    else:
        train(model, adapted, faces, options.epochs, options.rate)
    return model, adapted


def train(
    model: nn.Module,
    auxiliary: AdapterSet | ag.Guide | None,
    faces: Faces,
    epochs: int,
    rate: float,
) -> None:
    """Train a network on attributes, with a further loss if there is one, and leave it in evaluation mode."""
    own = [] if auxiliary is None else list(auxiliary.parameters())
    optimizer = torch.optim.AdamW([*model.parameters(), *own], lr=rate)
    batches = [part for _ in range(epochs) for part in torch.randperm(len(faces.images)).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    model.train()
    for index in track(batches, "training", console=_CONSOLE, transient=True):
        mirror = (torch.rand(len(index)) < 0.5)[:, None, None, None]
        images, labels = faces.batch(index), faces.labels[index]
        loss = F.binary_cross_entropy_with_logits(model(torch.where(mirror, images.flip(3), images)), labels)
        if auxiliary is not None:
            regions = {}
            if isinstance(auxiliary, ag.Guide) and faces.regions is not None:
                masks = faces.regions[index].float() / 255
                regions = {"regions": torch.where(mirror, masks.flip(3), masks)}
            loss = loss + auxiliary.loss(labels, **regions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], faces: Faces, corrupt: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Share of right answers for each attribute, `(K,)`."""
    right = []
    for index in torch.arange(len(faces.images)).split(64):
        images = faces.batch(index)
        right.append(
            (model(images if corrupt is None else corrupt(images)) > 0) == faces.labels[index].bool()
        )
    return torch.cat(right).float().mean(dim=0)


# ------------------------------------------------------------------------ the questions


def energies(model: nn.Module, faces: Faces) -> dict[str, list[float]]:
    """Energy of each attribute's mean mask where it is, in units of what a uniform mask has there.

    Once in the attribute's place, as one would paint it for all faces, and once in the regions of the face
    that show it, as the parser finds them, if they are known: what masks are guided to.
    """
    size = faces.images.shape[-1]
    templates = torch.stack([template(name, size) for name in ATTRIBUTES])[None]
    table = attribute_table(ATTRIBUTES)
    found: dict[str, list[Tensor]] = {"place": [], "region": []}
    for index in torch.arange(len(faces.images)).split(64):
        shown = ag.explain(model, faces.batch(index), source="multichannel", targets="all", size=None)
        masks = shown.by_layer[shown.layer]
        inside = {"place": F.adaptive_avg_pool2d(templates, masks.shape[-2:])}
        if faces.regions is not None:
            regions = resized(faces.regions[index].float() / 255, masks.shape[-2:])
            inside["region"] = torch.einsum("brhw,kr->bkhw", regions, table).clamp(max=1)
        for kind, place in inside.items():
            share = (masks * place).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))
            area = place.mean(dim=(2, 3))
            found[kind].append(torch.where(area > 0, share / area, torch.nan))
    return {kind: torch.cat(parts).nanmean(dim=0).tolist() for kind, parts in found.items() if parts}


def found_again(analysis: Analysis, by: Likeness, *, together: bool) -> dict[str, float]:
    """How often a partner is among the five most alike: of one place, together, any of these, and neither."""
    places = torch.stack([template(name, 64) for name in ATTRIBUTES]).flatten(1)
    both = torch.minimum(places[:, None], places[None]).sum(dim=2)
    overlap = both / torch.maximum(places[:, None], places[None]).sum(dim=2)
    listed = {name: {other for other, _ in others} for name, others in analysis.correlated(5, by).items()}
    hits: dict[str, list[bool]] = {"one place": [], "together": [], "neither": []}
    hair = {"black_hair", "blond_hair", "brown_hair", "bald", "bangs", "hat"}
    for first, name in enumerate(ATTRIBUTES):
        for second, other in enumerate(ATTRIBUTES):
            if first == second:
                continue
            hit = other in listed[name]
            if together and ((name, other) in TOGETHER or (other, name) in TOGETHER):
                hits["together"].append(hit)
            elif overlap[first, second] > 0.3:
                hits["one place"].append(hit)
            elif overlap[first, second] < 0.02 and not {name, other} <= hair:  # these exclude each other
                hits["neither"].append(hit)
    hits["either"] = hits["one place"] + hits["together"]
    return {kind: sum(found) / len(found) for kind, found in hits.items() if found}


def pruned(
    options: argparse.Namespace,
    adapted: AdapterSet,
    analysis: Analysis,
    faces: Faces,
    test: Faces,
    seed: int,
) -> list[dict[str, Any]]:
    """Accuracy at once and after another epoch, FLOPs and relative time of smaller networks."""
    images = test.first(32)
    rankings = {
        "analysis": analysis.ranking,
        "magnitude": magnitude_ranking(adapted, images),
        "random": torch.randperm(len(analysis.ranking), generator=torch.Generator().manual_seed(seed)),
    }
    rows = []
    for share in (0.0, *SHARES):
        for name, ranking in rankings.items():
            smaller = prune(adapted, images[:2], ranking, share)
            smaller.model.eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                smaller.model(images[:1])
            row: dict[str, Any] = {"share": share, "ranking": name, "flops": counter.get_total_flops()}
            row["time"] = relative_time(smaller.model, adapted.model, images)
            row["at once"] = float(accuracy(smaller.model, test).mean())
            torch.manual_seed(seed)
            train(smaller.model, smaller, faces, 1, options.rate / 5)
            row["accuracy"] = float(accuracy(smaller.model, test).mean())
            rows.append(row)
            smaller.remove()
    return rows


@torch.no_grad()
def relative_time(model: nn.Module, whole: nn.Module, images: Tensor, rounds: int = 15) -> float:
    """Median of what a forward pass takes, in units of the whole network's, measured by turns."""
    ratios = []
    for _ in range(rounds):
        times = []
        for network in (model, whole):
            start = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return sorted(ratios)[rounds // 2]


def noisy(images: Tensor, seed: int) -> Tensor:
    """Images with so much noise that a network is wrong about many of them."""
    return images + 0.8 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def against_noise(adapted: AdapterSet, analysis: Analysis, valid: Faces, test: Faces) -> dict[str, Any]:
    """Accuracy on noisy images with emphasized channels; how many, and how much, validation faces decide."""
    adapter = multichannel_of(adapted)

    def score(faces: Faces, seed: int, setting: tuple[float, float]) -> float:
        with emphasized(adapter, analysis.importance, share=setting[0], factor=setting[1]):
            return float(accuracy(adapted.model, faces, lambda images: noisy(images, seed)).mean())

    settings = [(share, factor) for share in (0.25, 0.5, 0.75) for factor in (0.0, 0.5, 0.8)]
    best = max([(1.0, 1.0), *settings], key=lambda setting: score(valid, 1, setting))
    return {
        "noise": score(test, 0, (1.0, 1.0)),
        "noise, emphasized": score(test, 0, best),
        "emphasis": dict(zip(("share", "factor"), best, strict=True)),
    }


def apart(guide: AdapterSet, known: Analysis, faces: Faces) -> dict[str, Any]:
    """Accuracy where attributes no longer appear together, as learned and with the partner suppressed."""
    model, attention = guide.model, multichannel_of(guide)
    pairs = [(ATTRIBUTES.index(one), ATTRIBUTES.index(other)) for one, other in TOGETHER]
    before, after = [], []
    plain = accuracy(model, faces)
    for one, other in [*pairs, *((other, one) for one, other in pairs)]:
        before.append(float(plain[one]))
        with suppressed(attention, known.importance, one, of=[other]):
            after.append(float(accuracy(model, faces)[one]))
    return {"apart": mean(before), "apart, suppressed": mean(after)}


# ------------------------------------------------------------------------------ main


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, and ask everything, with one seed."""
    if options.data is None:
        classes: Sequence[str] = ATTRIBUTES
        faces, valid, test = (
            drawn(options, count, 10 * seed + part) for part, count in enumerate((options.faces, 300, 600))
        )
    else:
        faces, valid, test = (photographs(options, split) for split in ("train", "valid", "test"))
        classes = CelebA(options.data, "test").classes
    found: dict[str, Any] = {"accuracy": {}}
    kept: AdapterSet | None = None
    for way, settings in WAYS.items():
        model, adapted = built(options, faces, seed, settings, classes)
        found["accuracy"][way] = accuracy(model, test).tolist()
        print(f"seed {seed}, {way}: accuracy {100 * mean(found['accuracy'][way]):.2f} %", flush=True)
        if way == "multi-channel attention":
            kept = adapted
    assert kept is not None

    analysis = analyzed(kept, valid, classes)
    found["pruning"] = pruned(options, kept, analysis, faces, test, seed)
    write_report(kept, analysis, test.first(6), options.out / "report.html")
    found["transformed"] = against_noise(kept, analysis, valid, test)
    if options.data is None:
        found["energy"] = {"free": energies(kept.model, test)}
        guided, _ = built(options, faces, seed, {}, classes, guided=True)
        found["energy"]["guided"] = energies(guided, test)
        found["accuracy"]["guided"] = accuracy(guided, test).tolist()
        together = drawn(options, options.faces, 10 * seed + 3, together=True)
        _, guide = built(options, together, seed, {}, classes)
        assert guide is not None
        known = analyzed(guide, drawn(options, 300, 10 * seed + 4, together=True), classes)
        found["transformed"] |= apart(guide, known, test)
        found["structure"] = {
            kind: {by: found_again(one, by, together=kind == "together") for by in get_args(Likeness)}
            for kind, one in (("independent", analysis), ("together", known))
        }
        print(f"seed {seed}: {found['structure']}", flush=True)
        for way, parts in found["energy"].items():
            means = {kind: round(mean(values), 2) for kind, values in parts.items()}
            print(f"seed {seed}, {way}: energy {means}", flush=True)
    print(f"seed {seed}: {found['transformed']}", flush=True)
    return {"classes": list(classes), **found}


def analyzed(guide: AdapterSet, faces: Faces, classes: Sequence[str]) -> Analysis:
    """Analyze some faces."""
    batches = (faces.batch(index) for index in torch.arange(len(faces.images)).split(64))
    return analyze(guide, batches, classes)


def compared(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train shared and full masks alone, without the other parts, and compare them."""
    faces, valid, test = (
        drawn(options, count, 10 * seed + part, regions=False)
        for part, count in enumerate((options.faces, 300, 600))
    )
    found: dict[str, Any] = {}
    for masks in get_args(Masks):
        settings = {"masks": masks, "multi_label": 0.0, "reconstruction": 0.0}
        start = time.process_time()
        model, adapted = built(options, faces, seed, settings, ATTRIBUTES)
        seconds = time.process_time() - start
        assert adapted is not None
        analysis = analyzed(adapted, valid, ATTRIBUTES)
        found[masks] = {
            "accuracy": accuracy(model, test).tolist(),
            "structure": {by: found_again(analysis, by, together=False) for by in get_args(Likeness)},
            "energy": energies(model, test)["place"],
            **dimensions(adapted, test.first(16)),
            "parameters": sum(weight.numel() for weight in adapted.parameters()),
            "seconds": seconds,
        }
        print(
            f"seed {seed}, {masks} masks: accuracy {100 * mean(found[masks]['accuracy']):.2f} %", flush=True
        )
    return found


@torch.no_grad()
def dimensions(adapted: AdapterSet, images: Tensor) -> dict[str, float]:
    """How free the masks of an image are: a row for each attribute and channel, a column for each position.

    The rank of this matrix, how many of its singular values hold 99 % of its energy, and the share of the
    rows with a mean below 0.1, which let almost nothing through (of full masks alone).
    """
    adapter = multichannel_of(adapted)
    masks = adapter.masks(trace_for(adapter, adapted.model, images).feature.spatial).flatten(3).flatten(1, 2)
    energy = torch.linalg.svdvals(masks).square()
    shares = energy.cumsum(dim=1) / energy.sum(dim=1, keepdim=True)
    return {
        "rank": float(torch.linalg.matrix_rank(masks).float().mean()),
        "99 %": float((shares < 0.99).sum(dim=1).add(1).float().mean()),
        "closed": float((masks.mean(dim=2) < 0.1).float().mean()),
    }


def mean(values: Sequence[float]) -> float:
    """Mean of some numbers."""
    return sum(values) / len(values)


def tables(found: dict[str, Any]) -> str:
    """Accuracy by attribute, and what pruning costs."""
    ways = dict(found["accuracy"])
    if len(found["classes"]) == len(POSTER):
        ways["poster"] = [value / 100 for value in POSTER]
    lines = [f"| attribute | {' | '.join(ways)} |", f"|---|{'--:|' * len(ways)}"]
    rows = [*zip(found["classes"], *ways.values(), strict=True), ("average", *map(mean, ways.values()))]
    lines += [
        f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |" for name, *values in rows
    ]
    lines += ["", "| channels removed | ranking | at once | trained on | MFLOPs | time |"]
    lines += ["|--:|---|--:|--:|--:|--:|"]
    for row in found["pruning"]:
        lines.append(
            f"| {row['share']:.0%} | {row['ranking']} | {100 * row['at once']:.1f} | "
            f"{100 * row['accuracy']:.1f} | "
            f"{row['flops'] / 1e6:.1f} | {row['time']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds CelebA's folder celeba; drawn faces without")
    add("--model", default="resnet18", help="timm's name of the network for photographs")
    add("--width", type=int, default=16, help="channels of the first block of the network for drawn faces")
    add("--limit", type=int, help="read so many photographs of each split")
    add("--size", type=int, help="of the images, in pixels; 64 for drawn faces, 128 for photographs")
    add("--faces", type=int, default=2500, help="number of drawn faces to learn from")
    add("--epochs", type=int, default=12)
    add("--rate", type=float, default=5e-3, help="highest learning rate")
    add("--guidance", type=float, default=0.3, help="λ of the guidance by regions")
    add("--masks", choices=get_args(Masks), default="shared", help="how masks are computed")
    add("--compare-masks", action="store_true", help="compare both kinds of masks alone, on drawn faces")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("attnguide-multichannel"), help="folder for results")
    options = parser.parse_args()
    options.size = options.size or (64 if options.data is None else 128)
    if options.compare_masks and options.data is not None:
        parser.error(
            "--compare-masks needs drawn faces, of which the places of attributes are known: no --data."
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        found = (compared if options.compare_masks else run)(options, options.seed)
    except (AttnGuideError, OSError) as error:
        sys.exit(f"celeba_multichannel.py: {error}")
    if not options.compare_masks:
        print(tables(found))
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.out / "result.json").write_text(json.dumps({"settings": settings, **found}, indent=1))


if __name__ == "__main__":
    main()
