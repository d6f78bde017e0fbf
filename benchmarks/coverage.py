"""Which models does attnguide explain and guide with no argument but the model, and is the map right?

The library is judged from outside, by its public functions alone. An image that is changed in one place must
move the map in that place. Models have random weights, so nothing is downloaded.

    python benchmarks/coverage.py                  the smallest model of each of timm's modules, torchvision's
                                                   classifiers, and some of transformers'
    python benchmarks/coverage.py --all            every architecture of timm up to 100 million parameters
    python benchmarks/coverage.py --models NAME…   these; `torchvision/resnet18`, `transformers/ViT`
    python benchmarks/coverage.py --summary        a table of what has been measured, as Markdown
    python benchmarks/coverage.py --list           a line for each model
    python benchmarks/coverage.py --self-test      whether the judge notices maps that are read wrongly

Each model appends a line to the results; what is there already is left out, so a run may be interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import attnguide as ag

try:
    import transformers
except ImportError:
    transformers = None

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
Record = dict[str, Any]
Size = tuple[int, int, int]
#: Maps `(B, T, h, w)` of images `(B, C, H, W)`.
Mapper = Callable[[Tensor], Tensor]
Made = TypeVar("Made")

# ------------------------------------------------------------------ which models

#: For `--all`, in millions of parameters: what a machine with a few gigabytes can train.
LIMIT = 100.0
_VIT = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
_SWIN = {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16]}
#: Families of transformers, made small; their own defaults are those of the "base" models.
FAMILIES: dict[str, dict[str, Any]] = {
    "Beit": _VIT,
    "ConvNext": {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 4, 2]},
    "DeiT": _VIT,
    "Dinov2": {**_VIT, "image_size": 224},
    "Dinov2WithRegisters": {**_VIT, "image_size": 224},
    "PvtV2": {},
    "ResNet": {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    "Swin": _SWIN,
    "Swinv2": _SWIN,
    "ViT": _VIT,
}


@dataclass(frozen=True)
class Case:
    """A model: its name, its origin, and a function that builds it and returns the size of its images."""

    name: str
    group: str
    module: str
    build: Callable[[], tuple[nn.Module, Size]]


def timm_case(name: str, size: tuple[int, int] | None) -> Case:
    def build() -> tuple[nn.Module, Size]:
        settings = timm.get_pretrained_cfg(name)
        # Some architectures are published as encoders; a classifier is made of them by a head.
        options: dict[str, Any] = {} if settings is None or settings.num_classes else {"num_classes": 1000}
        if size and settings is not None and settings.fixed_input_size:
            options["img_size"] = size
        model = timm.create_model(name, **options)
        channels, *own = model.pretrained_cfg["input_size"]
        return model, (channels, *(size or own))

    return Case(name, "timm", timm.model_entrypoint(name).__module__.rpartition(".")[2], build)


def torchvision_case(name: str, size: tuple[int, int] | None) -> Case:
    def build() -> tuple[nn.Module, Size]:
        own = (299, 299) if name.startswith("inception") else (224, 224)
        return torchvision.models.get_model(name), (3, *(size or own))

    module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
    return Case(f"torchvision/{name}", "torchvision", module, build)


def transformers_case(family: str, size: tuple[int, int] | None) -> Case:
    if transformers is None:
        raise ValueError("transformers is not installed: pip install transformers")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")

    def build() -> tuple[nn.Module, Size]:
        config = getattr(transformers, f"{family}Config")(num_labels=100, **FAMILIES[family])
        own = getattr(config, "image_size", 224)
        own = (own, own) if isinstance(own, int) else tuple(own)
        model = getattr(transformers, f"{family}ForImageClassification")(config)
        return model, (config.num_channels, *(size or own))

    return Case(f"transformers/{family}", "transformers", family, build)


def case_of(name: str, size: tuple[int, int] | None) -> Case:
    """Find a model by its name; one that does not exist is a ValueError."""
    group, _, own = name.rpartition("/")
    makers = {"": timm_case, "torchvision": torchvision_case, "transformers": transformers_case}
    try:
        return makers[group](own, size)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"unknown model {name!r}") from error


def timm_parameters(folder: Path) -> dict[str, int]:
    """Count the parameters of all of timm's architectures, which takes minutes, and keep them."""
    file = folder / f"timm-{timm.__version__}.json"
    counts: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    if not counts:
        with progress_bar() as progress, torch.device("meta"):
            for name in progress.track(timm.list_models(), description="sizes of timm's models"):
                counts[name] = sum(weight.numel() for weight in timm.create_model(name).parameters())
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(counts))
    return counts


def smallest_of_each_module(counts: dict[str, int]) -> list[str]:
    """Choose timm's smallest classifier of each module; an encoder without a head where there is no other."""

    def order(name: str) -> tuple[bool, int]:
        settings = timm.get_pretrained_cfg(name)
        return settings is not None and not settings.num_classes, counts[name]

    return [min(timm.list_models(module=module), key=order) for module in timm.list_modules()]


def choose_names(options: argparse.Namespace) -> list[str]:
    if options.models:
        return list(options.models)
    chosen = {group for group in ("timm", "torchvision", "transformers") if getattr(options, group)}
    if not chosen and not options.all:
        chosen = {"timm", "torchvision", "transformers"}
    counts: dict[str, int] = {}
    if options.all:
        found = timm_parameters(options.results.parent)
        counts |= {name: found[name] for name in found if found[name] <= 1e6 * LIMIT or options.max_params}
    if "timm" in chosen:
        found = timm_parameters(options.results.parent)
        counts |= {name: found[name] for name in smallest_of_each_module(found)}
    if "torchvision" in chosen:
        for name in torchvision.models.list_models(module=torchvision.models):
            weights = torchvision.models.get_model_weights(name).DEFAULT
            counts[f"torchvision/{name}"] = weights.meta["num_params"]
    if "transformers" in chosen and transformers is None:
        print("transformers is not installed, so its models are left out: pip install transformers")
    elif "transformers" in chosen:
        counts |= {f"transformers/{family}": 0 for family in FAMILIES}  # all of them are small
    limit = 1e6 * (options.max_params or math.inf)
    return sorted((name for name in counts if counts[name] <= limit), key=counts.__getitem__)


# ------------------------------------------------------- images, and weights that behave

#: So many pixels go through a model at once; bounds the memory where images are large.
PIXELS = 1_000_000


def noise(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """Draw images that are smooth with some grain, of about unit variance."""
    channels, *sides = size
    smooth = F.interpolate(torch.randn(count, channels, 8, 8, generator=generator), sides, mode="bicubic")
    return smooth / smooth.std() * 0.85 + 0.5 * torch.randn(count, *size, generator=generator)


def wake(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Give untrained weights what training would have given them, because fresh ones mislead.

    A residual branch with a gain of zero computes nothing. A normalisation whose gains are all one leaves
    nothing for a mean over channels. Batch normalisation that has seen no data normalises nothing.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and not bool(weight.any()):
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
            elif weight.ndim < 2 and "bias" not in name.rpartition(".")[2] and weight.unique().numel() == 1:
                uneven = 0.5 + torch.rand(weight.shape, generator=generator)
                weight.copy_(uneven * (weight if bool(weight.any()) else 0.2))
    # Evaluation mode everywhere else: nothing is to be dropped at random.
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def prepare(case: Case, seed: int) -> tuple[nn.Module, Tensor]:
    """Build a model that behaves, and two images for it."""
    torch.manual_seed(seed)
    model, size = case.build()
    generator = torch.Generator().manual_seed(seed)
    wake(model, noise(4, size, generator), generator)
    return model, noise(2, size, generator)


def size_of(images: Tensor) -> Size:
    return images.shape[1], images.shape[2], images.shape[3]


# ------------------------------------------------------------- is the map right?

#: Number of rows and columns of places that the image is divided into.
PLACES = 3
#: A place is changed by so much of other noise. Very little, because untrained networks amplify a change from
#: layer to layer; where that saturates, the place where it began no longer stands out.
AMOUNT = 0.001
#: Grad-CAM is zero wherever nothing speaks for the class. Several classes leave few positions without a word.
CLASSES = 4
#: Two halves of the images must agree to this degree on which place moves which position: to be judged, and
#: to be judged without further images.
CLEAR, EVIDENT = 0.5, 0.8
#: Least agreement with the positions' own places, noise taken out. Misreadings that are not on the list below
#: stay under 0.25.
RIGHT = 0.4
#: The best reading must fit better than the second, by this share of what sets the two apart.
LEAD = 0.2
MOST_IMAGES = 256


@dataclass(frozen=True)
class Verdict:
    """Judgement of a map.

    Attributes:
        verdict: `"right"`, `"wrong"`, or `"unclear"` where the map hardly distinguishes places.
        score: Agreement of what moves each position with the place where it lies; 1 is perfect.
        clarity: Agreement of two halves of the images with each other; how well the model keeps places apart.
        reading: Reading that explains the map best: `"right"`, a misreading, `"scrambled"`, `"undecided"`.
        images: Number of images that were changed.
        grid: Rows and columns of the map.
    """

    verdict: str
    score: float
    clarity: float
    reading: str
    images: int
    grid: tuple[int, int]


def changed(size: Size, generator: torch.Generator) -> Tensor:
    """Return an image, followed by copies of it with a change in one place each."""
    base, other = noise(1, size, generator), noise(1, size, generator)
    mixed = math.sqrt(1 - AMOUNT**2) * base + AMOUNT * other
    images = base.repeat(1 + PLACES**2, 1, 1, 1)
    rows, columns = (torch.arange(side) * PLACES // side for side in size[1:])
    for place in range(PLACES**2):
        inside = (rows[:, None] == place // PLACES) & (columns == place % PLACES)
        images[1 + place] = torch.where(inside, mixed[0], base[0])
    return images


def movements(maps: Tensor) -> Tensor:
    """Return how much each place moves each position: `(places, h·w)`, of maps of `changed` images.

    Every place counts the same, however far its change moves the map, and so does every class.
    """
    moved = (maps[1:] - maps[:1]).double().flatten(2)
    # A change of the whole map carries no information about places. The median is zero where Grad-CAM is.
    moved = (moved - moved.median(dim=2, keepdim=True).values).abs()
    mean = moved.mean(dim=2, keepdim=True)
    return torch.where(mean > 0, moved / mean, 0).sum(dim=1)


def contrast(amounts: Tensor) -> Tensor:
    """Find the place that moves a position, and only that position, more than others do."""
    mean = amounts.mean(dim=0, keepdim=True)
    relative = torch.where(mean > 0, amounts / mean, 1)
    relative = relative - relative.mean(dim=0, keepdim=True)
    return relative - relative.mean(dim=1, keepdim=True)


def correlation(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float((one * other).sum() / norms) if norms > 0 else 0.0


def shares(places: int, cells: int) -> Tensor:
    """Compute which share of each cell lies in each place along one side, `(places, cells)`."""
    edges, borders = torch.linspace(0, 1, cells + 1), torch.linspace(0, 1, places + 1)
    start, end = torch.maximum(edges[:-1], borders[:-1, None]), torch.minimum(edges[1:], borders[1:, None])
    return ((end - start).clamp_min(0) * cells).double()


def readings(height: int, width: int) -> dict[str, Tensor]:
    """List what `contrast` ideally is, if the map is read rightly (the first) and if it is misread."""

    def seen(height: int, width: int) -> Tensor:
        return torch.einsum("ph,qw->pqhw", shares(PLACES, height), shares(PLACES, width))

    right, order = seen(height, width), torch.arange(height * width)
    found = {
        "right": right,
        "rows for columns": right.transpose(0, 1),
        "upside down": right.flip(0),
        "mirrored": right.flip(1),
        "turned": right.flip(0, 1),
    }
    for steps in (1, -1, 2, -2, width, -width):
        found[f"shifted by {steps}"] = right.flatten(2).roll(steps, 2)
    for other in range(2, height * width // 2):
        if len(order) % other == 0:
            found[f"{width} columns for {other}"] = seen(len(order) // other, other)
    for side in range(2, min(height, width)):
        if height % side == 0 and width % side == 0:
            windows = order.view(height // side, side, width // side, side).transpose(1, 2).flatten()
            found[f"windows of {side} for rows"] = right.flatten(2)[..., windows]
            found[f"rows for windows of {side}"] = right.flatten(2)[..., windows.argsort()]
    ideal = {name: contrast(template.reshape(PLACES**2, -1)) for name, template in found.items()}
    own = ideal["right"]
    return {name: t for name, t in ideal.items() if name == "right" or correlation(t, own) < 0.999}


def weigh(seen: list[Tensor], grid: tuple[int, int]) -> Verdict:
    """Judge from what several images showed, at least two."""
    ideals = readings(*grid)
    fits = {name: correlation(contrast(sum(seen)), ideal) for name, ideal in ideals.items()}
    halves = max(correlation(contrast(sum(seen[::2])), contrast(sum(seen[1::2]))), 0.0)
    # Spearman and Brown: how far the mean of all images is to be trusted, from how far two halves agree.
    clarity = 2 * halves / (1 + halves)
    noiseless = {name: fit / math.sqrt(max(clarity, CLEAR)) for name, fit in fits.items()}
    score = noiseless.pop("right")
    reading = max(noiseless, key=noiseless.__getitem__)
    lead, apart = score - noiseless[reading], 1 - correlation(ideals["right"], ideals[reading])
    if max(score, noiseless[reading]) < RIGHT:
        reading = "scrambled"
    elif abs(lead) < LEAD * apart:
        reading = "undecided"
    elif lead > 0:
        reading = "right"
    if clarity < CLEAR:
        reading = "undecided"
    verdict = {"right": "right", "undecided": "unclear"}.get(reading, "wrong")
    return Verdict(verdict, round(min(score, 1.0), 3), round(clarity, 3), reading, len(seen), grid)


def judge(maps_of: Mapper, size: Size, seed: int, patience: float) -> Verdict:
    """Change images place by place until it is evident what moves which position, or patience ends."""
    generator = torch.Generator().manual_seed(seed)
    batch = max(2, PIXELS // (size[1] * size[2]))
    seen: list[Tensor] = []
    start = time.perf_counter()
    while True:
        maps = torch.cat([maps_of(images) for images in changed(size, generator).split(batch)])
        if not bool(maps.isfinite().all()):
            raise ValueError("the map is not finite")
        seen.append(movements(maps))
        if len(seen) % 2:
            continue
        verdict = weigh(seen, (maps.shape[-2], maps.shape[-1]))
        late = len(seen) >= MOST_IMAGES or time.perf_counter() - start > patience
        if late or (verdict.verdict != "unclear" and verdict.clarity >= EVIDENT):
            return verdict


def severest(verdicts: Iterable[Verdict]) -> Verdict:
    """Choose the verdict that counts, of sources that read the same layer in the same way."""
    order = ("unclear", "right", "wrong")
    return max(verdicts, key=lambda found: (order.index(found.verdict), found.clarity))


def mapper(model: nn.Module, source: str | ag.AttributionSource, classes: int) -> Mapper:
    targets = sorted({classes * step // CLASSES for step in range(CLASSES)})
    return lambda images: ag.explain(model, images, source=source, targets=targets, size=None).maps


# ---------------------------------------------------------------- does it guide?

STEPS = 8
#: Small, because untrained networks explode at ten times as much while their batch statistics are kept.
LEARNING_RATE = 1e-4


def belongings(model: nn.Module) -> list[Any]:
    """List what must be the same after a visit: flags, switches, hooks, and whether gradients are kept."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, module.training, getattr(module, "fused_attn", None), *(len(vars(module)[h]) for h in hooks))
        for name, module in model.named_modules()
    ]
    return [*modules, *((name, weight.requires_grad) for name, weight in model.named_parameters())]


def values(model: nn.Module) -> list[float]:
    return [float(tensor.detach().double().sum()) for tensor in model.state_dict().values()]


@contextmanager
def unchanged(model: nn.Module, who: str, look: Callable[[nn.Module], list[Any]]) -> Iterator[None]:
    before = look(model)
    yield
    for was, now in zip(before, look(model), strict=True):
        if was != now:
            raise AssertionError(f"{who} changed the model: {was} became {now}")


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def settle(model: nn.Module) -> None:
    """Make a model in training mode deterministic: nothing is dropped, statistics are kept.

    Evaluation mode would do it too, but some models cache parts of their graph there.
    """
    for module in model.modules():
        dropping = "drop" in type(module).__name__.lower() or isinstance(module, StochasticDepth)
        if dropping or isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False  # not eval(), which would reach what a dropping module contains


def corners(size: Size) -> Tensor:
    """Make a mask for each of two images: the upper left quarter, and the lower right."""
    masks = torch.zeros(2, *size[1:])
    masks[0, : size[1] // 2, : size[2] // 2] = 1
    masks[1, size[1] // 2 :, size[2] // 2 :] = 1
    return masks


def guide(model: nn.Module, images: Tensor) -> Record:
    """Train one step, then a few for the guidance alone.

    Returns:
        `reached`, the share of the weights' tensors that get a gradient of the guidance term alone, and
        `ratio`, the term's last value by its first.
    """
    masks, labels = corners(size_of(images)), torch.tensor([0, 1])
    model.train()
    with unchanged(model, "guiding", belongings), ag.Guide(model) as guided:
        loss = F.cross_entropy(logits_of(model(images)), labels) + guided.loss(labels, mask=masks)
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients)):
            raise ValueError("the loss or a gradient is not finite")
    settle(model)
    model.zero_grad()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    terms: list[float] = []
    with unchanged(model, "guiding", belongings), ag.Guide(model) as guided:
        for step in range(STEPS):
            model(images)
            term = guided.loss(labels, mask=masks)
            terms.append(float(term.detach()))
            term.backward()
            if step == 0:
                reached = [w.grad is not None and bool(w.grad.any()) for w in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    if not all(math.isfinite(term) for term in terms):
        raise ValueError("the guidance term is not finite after some steps")
    return {
        "reached": round(sum(reached) / len(reached), 3),
        "ratio": round(terms[-1] / max(terms[0], 1e-9), 3),
    }


# --------------------------------------------------------------------- one model


def examine(case: Case, seed: int, patience: float) -> Record:
    """Build a model, explain, judge, guide; whatever goes wrong is part of the record."""
    record: Record = {"name": case.name, "group": case.group, "module": case.module, "versions": versions()}
    start = time.perf_counter()
    try:
        model, images = prepare(case, seed)
        record["parameters"] = sum(weight.numel() for weight in model.parameters())
        record["size"] = size_of(images)
        logits, record["inference_s"] = timed(partial(predict, model, images))
    except Exception as error:  # noqa: BLE001  (a model that does not run is not an error of the library)
        return record | {"verdict": "skipped", "error": first_line(error)}
    if logits.ndim != 2 or logits.shape[1] < 2:
        return record | {"verdict": "skipped", "error": f"no classifier, answers {tuple(logits.shape)}"}
    try:
        record |= explained(model, images, logits.shape[1], seed, patience)
    except Exception as error:  # noqa: BLE001  (one model must not end the run)
        record |= {"verdict": "failed", "error": first_line(error)}
    try:
        record |= guide(model, images)
        fine = record["reached"] >= 0.5 and record["ratio"] < 1
        record["guided"] = "yes" if fine else "no effect"
    except Exception as error:  # noqa: BLE001
        record |= {"guided": "failed", "guide_error": first_line(error)}
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def explained(model: nn.Module, images: Tensor, classes: int, seed: int, patience: float) -> Record:
    with unchanged(model, "explaining", belongings), unchanged(model, "explaining", values):
        first, seconds = timed(partial(ag.explain, model, images))
    size = size_of(images)
    if first.maps.shape != (2, 1, *size[1:]):
        raise ValueError(f"the maps of two images have the shape {tuple(first.maps.shape)}")
    sources = {
        source: judge(mapper(model, source, classes), size, seed, patience)
        for source in ("grad_cam", "layer_attention")
    }
    worst = severest(sources.values())
    return {
        "verdict": worst.verdict,
        "score": worst.score,
        "reading": worst.reading,
        "layer": first.layer,
        "grid": worst.grid,
        "explain_s": seconds,
        "sources": {
            source: {"verdict": v.verdict, "score": v.score, "clarity": v.clarity, "images": v.images}
            for source, v in sources.items()
        },
    }


def predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model(images))


def timed(function: Callable[[], Made]) -> tuple[Made, float]:
    start = time.perf_counter()
    value = function()
    return value, round(time.perf_counter() - start, 3)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def versions() -> dict[str, str]:
    packages = (ag, torch, timm, torchvision, transformers)
    return {package.__name__: package.__version__ for package in packages if package is not None}


# ------------------------------------------------------------------- the results


class Results:
    """A file of JSON lines, one for each model; the last line of a name counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        text = path.read_text() if path.exists() else ""
        self._separator = "" if text.endswith("\n") or not text else "\n"
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a run that was killed may leave half a line
                continue
            self.records[record["name"]] = record

    def add(self, record: Record) -> None:
        self.records[record["name"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(self._separator + json.dumps(record) + "\n")
        self._separator = ""


def summary(records: Iterable[Record]) -> str:
    """Report as Markdown how many models of each group are explained and guided, and name the others."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    lines = ["| group | models | explained | right | unclear | wrong | failed | guided |", "|---" * 8 + "|"]
    for group, members in sorted(groups.items()):
        tried = [record for record in members if record["verdict"] != "skipped"]
        count = {v: sum(r["verdict"] == v for r in tried) for v in ("right", "unclear", "wrong", "failed")}
        guided = sum(record.get("guided") == "yes" for record in tried)
        cells = (group, len(tried), len(tried) - count["failed"], *count.values(), guided)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    everything = [record for members in groups.values() for record in members]
    for verdict in ("wrong", "unclear", "failed", "skipped"):
        lines += named(verdict.capitalize(), [r for r in everything if r["verdict"] == verdict], describe)
    unguided = [r for r in everything if r["verdict"] != "skipped" and r.get("guided") != "yes"]
    return "\n".join(lines + named("Not guided", unguided, describe_guiding))


def listing(records: Iterable[Record]) -> str:
    """Return the records of all models as a Markdown table."""
    lines = ["| model | size | layer | grid | map | guided |", "|---|--:|---|--:|---|---|"]
    for record in sorted(records, key=lambda record: (record["group"], record["name"])):
        if record["verdict"] != "skipped":
            layer = f"`{record['layer']}`" if "layer" in record else ""
            grid = "×".join(map(str, record.get("grid", ())))
            size = "×".join(map(str, record["size"][1:]))
            cells = (record["name"], size, layer, grid, record["verdict"], record.get("guided", "no"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def named(title: str, records: list[Record], describe: Callable[[Record], str]) -> list[str]:
    return ["", f"{title}:", "", *(f"- `{r['name']}`: {describe(r)}" for r in records)] if records else []


def describe(record: Record) -> str:
    if "error" in record:
        return record["error"]
    clarity = max(source["clarity"] for source in record["sources"].values())
    where = f"`{record['layer']}`, {record['grid'][0]}×{record['grid'][1]}"
    return f"{where}, {record['reading']}, score {record['score']:.2f}, clarity {clarity:.2f}"


def describe_guiding(record: Record) -> str:
    if "guide_error" in record:
        return record["guide_error"]
    return f"the term falls to {record['ratio']:.0%}, {record['reached']:.0%} of the weights reached"


# --------------------------------------------------------------------- self-test


class Misread(ag.AttributionSource):
    """Grad-CAM or the channel mean of a feature that is read wrongly: `(B, C, h, w)` in, the same out."""

    def __init__(self, error: Callable[[Tensor], Tensor], gradient: bool) -> None:
        self.error, self.needs_gradient = error, gradient

    def __call__(self, trace: Any, pairs: Any) -> Tensor:
        features = self.error(trace.feature.spatial[pairs.sample])
        if not self.needs_gradient:
            return ag.functional.channel_mean(features)
        return ag.functional.grad_cam(features, self.error(trace.gradients(pairs)))

    def size(self, trace: Any) -> tuple[int, int]:
        height, width = self.error(trace.feature.spatial).shape[-2:]
        return height, width


def reordered(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make an error of a function that rearranges the positions `(h, w)`."""

    def error(features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        taken = order(torch.arange(height * width).view(height, width)).reshape(height, width)
        return features.flatten(2)[:, :, taken]

    return error


def in_windows(order: Tensor) -> Tensor:
    side = next((side for side in range(2, len(order)) if len(order) % side == 0), len(order))
    count = len(order) // side
    return order.view(count, side, count, side).transpose(1, 2).flatten()


def folded(features: Tensor) -> Tensor:
    height, width = features.shape[-2:]
    return features if width % 2 else features.reshape(*features.shape[:2], height * 2, width // 2)


def shuffled(order: Tensor) -> Tensor:
    return order.flatten()[torch.randperm(order.numel(), generator=torch.Generator().manual_seed(0))]


#: Small models whose maps distinguish places well, in three grids; the last does so less well.
EASY = ("test_resnet", "test_vit", "test_convnext", "mobilevit_xxs")
ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": reordered(lambda order: order),
    "rows for columns": reordered(lambda order: order.T),
    "upside down": reordered(lambda order: order.flip(0)),
    "mirrored": reordered(lambda order: order.flip(1)),
    "turned by 90°": reordered(lambda order: order.rot90()),
    "one token late": reordered(lambda order: order.flatten().roll(1)),
    "three tokens early": reordered(lambda order: order.flatten().roll(-3)),
    "one row late": reordered(lambda order: order.roll(1, 0)),
    "windows for rows": reordered(in_windows),
    "each row read as two": folded,
    "shuffled": reordered(shuffled),
    "channels last taken for first": lambda features: features.permute(0, 2, 3, 1),
}


def self_test(seed: int, patience: float) -> bool:
    """Plant errors; whether the judge finds each of them, and nothing where there is none."""
    passed = True
    for name in EASY:
        model, images = prepare(case_of(name, None), seed)
        size, classes = size_of(images), predict(model, images).shape[1]
        for error, plant in ERRORS.items():
            sources = (Misread(plant, gradient=True), Misread(plant, gradient=False))
            verdicts = [judge(mapper(model, source, classes), size, seed, patience) for source in sources]
            found = severest(verdicts)
            if error in ("windows for rows", "each row read as two") and found.grid == (5, 5):
                continue  # five rows and columns cannot be divided
            good = found.verdict == ("right" if error == "none" else "wrong")
            passed &= good
            scores = "  ".join(f"{each.verdict:7} {each.score:5.2f}" for each in verdicts)
            print(f"{name:15} {error:30} {scores}  {found.reading}{'' if good else '  <- NOT EXPECTED'}")
    print("passed" if passed else "FAILED")
    return passed


# ------------------------------------------------------------------ command line


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def measure(cases: list[Case], results: Results, options: argparse.Namespace) -> None:
    left = [case for case in cases if options.again or case.name not in results.records]
    with progress_bar() as progress:
        task = progress.add_task("", total=len(left))
        for case in left:
            progress.update(task, description=case.name)
            record = examine(case, options.seed, options.patience)
            results.add(record)
            gc.collect()  # models are full of cycles
            outcome = f"{record['verdict']}, {describe(record)}, guided: {record.get('guided', 'no')}"
            progress.console.print(f"{case.name}: {outcome}", markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)


def sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--timm", action="store_true", help="the smallest model of each of timm's modules")
    add("--all", action="store_true", help="every architecture of timm up to --max-params")
    add("--torchvision", action="store_true", help="torchvision's classifiers")
    add("--transformers", action="store_true", help="some of transformers' families, made small")
    add("--models", nargs="+", metavar="NAME", help="these models alone")
    add("--max-params", type=float, metavar="MILLIONS", help=f"default: {LIMIT:g} with --all, else none")
    add("--size", type=sides, metavar="H[xW]", help="of the images; default: the model's own")
    add("--results", type=Path, default=RESULTS, metavar="FILE")
    add("--again", action="store_true", help="also what has been measured already")
    add("--patience", type=float, default=120, metavar="SECONDS", help="to judge a map; default: 120")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--summary", action="store_true", help="measure nothing")
    add("--list", action="store_true", help="measure nothing; a line for each model")
    add("--self-test", action="store_true", help="test the judge")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the models' authors
    torch.set_num_threads(options.threads)
    os.environ["ATTNGUIDE_CACHE"] = "off"  # layers that were found in another run are found anew
    if options.self_test:
        return 0 if self_test(options.seed, options.patience) else 1
    results = Results(options.results)
    try:
        if not (options.summary or options.list):
            names = choose_names(options)
            measure([case_of(name, options.size) for name in names], results, options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
    print((listing if options.list else summary)(results.records.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
