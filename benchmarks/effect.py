"""Does guidance work? Methods of guiding, on data with a shortcut.

    python benchmarks/effect.py --data mnist.npz                       # goes on where it stopped
    python benchmarks/effect.py --data mnist.npz --tasks decoy-cdep --methods unguided rrr --seeds 0 1
    python benchmarks/effect.py --data waterbirds/ --tasks birds --methods unguided swap intervention
    python benchmarks/effect.py --data mnist.npz --cost                # seconds of a step, not of all that
    python benchmarks/effect.py --summary decoy-cdep                   # runs nothing, prints what was found
    python benchmarks/effect.py --figures                              # the same, as docs/images/effect-*.png

Nothing is chosen by test images. λ is chosen first, for each method, in one run each with a seed of its
own, on a validation split of the *training* distribution, where what is outside the masks is exchanged
between images, which a model that does not look there hardly notices: of the λ whose accuracy lies within one
standard error of the best, the largest. Then each seed is trained anew, and tested after every epoch; besides
the last epoch the tables show the one that this validation picks. Each run is a line in
`results/effect/TASK.jsonl`, and not repeated if it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur, resized_crop

import attnguide as ag
from attnguide.guiding.recipe import load_recipe
from attnguide.losses.pointwise import MSE, Outside
from attnguide.masks import SwapOutside
from attnguide.sources.grad_cam import HiResCAM
from attnguide.sources.gradient import Gradient
from measuring import alternate, compared, describe, machine
from tasks import TASKS, VARIANTS, Part, Task

RESULTS = Path(__file__).parent / "results" / "effect"
FIGURES = Path(__file__).parents[1] / "docs" / "images"
#: λ is chosen with this seed, which no result is reported for.
CHOOSING = 100
#: Images whose maps are measured.
LOOKED_AT = 500
#: Seeds below this are audited, where the data are photographs.
AUDITED = 3


@dataclass(frozen=True)
class Method:
    """A way to guide.

    Attributes:
        title: Title in the tables.
        guide: Arguments of a guide, without λ; None for no guidance.
        weights: λ to choose from.
        every: Guide in every n-th step, with n times λ.
        like: The method whose λ is taken; None to choose it.
        exchange: What is outside the masks is exchanged between images, and the network learns from
            `"images"` like these; or from these and from how its `"predictions"` differ.
        layer: What is exchanged: the images, or the features of a layer.
        share: Share of the images of a step that are exchanged; the others run once.
        augment: What is done to half of the images of a step, given images and masks.
        alone: What is outside the masks is grey everywhere, in the test too: what the objects alone allow.
        groups: How group labels are used: `"weights"` gives each group the same weight, `"dro"` weights them
            by their loss (Sagawa et al., ICLR 2020: exponentiated, step 0.01).
        tasks: The tasks that it is for; all, if there are none.
    """

    title: str
    guide: Callable[[], dict[str, Any]] | None
    weights: tuple[float, ...] = (1.0,)
    every: int = 1
    like: str | None = None
    exchange: Literal["images", "predictions"] | None = None
    layer: str = "input"
    share: float = 1.0
    augment: Callable[[Tensor, Tensor], Tensor] | None = None
    alone: bool = False
    groups: Literal["weights", "dro"] | None = None
    tasks: tuple[str, ...] = ()

    @property
    def masked(self) -> bool:
        """Whether it uses masks."""
        return self.guide is not None or self.exchange is not None or self.augment is not None


def _signed(**more: Any) -> dict[str, Any]:
    return {"source": HiResCAM(relu=False), "loss": "outside", **more}


def _grey(images: Tensor, masks: Tensor) -> Tensor:
    """The mean color of the normalization, 0, outside of the masks."""
    return images * masks


def _blurred(images: Tensor, masks: Tensor) -> Tensor:
    return torch.lerp(gaussian_blur(images, [31, 31], [8.0, 8.0]), images, masks)


def _cropped(images: Tensor, masks: Tensor) -> Tensor:
    """The box of each mask, squeezed into the size of the image."""
    height, width = images.shape[-2:]
    crops = []
    for image, mask in zip(images, masks[:, 0] > 0.5, strict=True):
        rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        top, left = int(rows[0]), int(columns[0])
        crops.append(
            resized_crop(
                image, top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1, [height, width]
            )
        )
    return torch.stack(crops)


def _at(layer: str, source: Any, loss: Any, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"source": source, "loss": loss, "layer": layer, **more}


#: Layers of the network of birds: the end of the frozen blocks, and that of the last block.
MIDDLE, LAST = "model.blocks.3", "model.blocks.6"
#: λ of the recipe `right-for-real`, which is chosen on birds, with images exchanged, and taken everywhere.
RECIPE = (10.0,)
BIRDS_ONLY = ("birds",)
#: Those with a network that was pretrained on photographs.
PHOTOGRAPHS = ("birds", "expressions")

METHODS: dict[str, Method] = {
    "unguided": Method("unguided", None),
    "rrr": Method(
        "right for the right reasons: gradient of the images, log-probabilities; `outside`, not scaled",
        lambda: {"source": Gradient(score="log_probabilities"), "loss": Outside(scale="none")},
        (1.0, 10.0, 100.0),
    ),
    "input_gradient": Method(
        "`input_gradient`, `outside`",
        lambda: {"source": "input_gradient", "loss": "outside"},
        (1.0, 10.0, 100.0),
    ),
    "hires_cam": Method(
        "`hires_cam`, signed; `outside`",
        _signed,
        (1.0, 10.0, 100.0),
    ),
    "hires_cam_all": Method(
        "`hires_cam`, signed, four classes drawn; `outside`",
        partial(_signed, targets="all"),
        (1.0, 10.0, 100.0),
    ),
    "hires_cam_half": Method(
        "`hires_cam`, signed; `outside`; in every second step, with 2 λ",
        _signed,
        every=2,
        like="hires_cam",
    ),
    "hires_cam_lazy": Method(
        "`hires_cam`, signed; `outside`; in every fourth step, with 4 λ",
        _signed,
        every=4,
        like="hires_cam",
    ),
    "hires_cam_pooled": Method(
        "`hires_cam`, signed, after the last pooling; `outside`",
        partial(_signed, layer="5"),
        (1.0, 10.0, 100.0),
    ),
    "hires_cam_pooled_half": Method(
        "`hires_cam`, signed, after the last pooling; `outside`; in every second step, with 2 λ",
        partial(_signed, layer="5"),
        every=2,
        like="hires_cam_pooled",
    ),
    "grad_cam_energy": Method(
        "`grad_cam`, `energy`",
        lambda: {"source": "grad_cam", "loss": "energy"},
        (0.1, 1.0, 10.0),
    ),
    "grad_cam_iou": Method(
        "the recipe `gradcam-iou`: `grad_cam`, `iou`, all classes, evidence of the decision",
        lambda: {name: value for name, value in load_recipe("gradcam-iou").guide.items() if name != "weight"},
        (0.1, 0.3, 1.0),
    ),
    "rrr_g": Method(
        "RRR-G: `grad_cam`, `outside`",
        lambda: {"source": "grad_cam", "loss": Outside(scale="unit")},
        (1.0, 10.0, 100.0),
    ),
    "hint": Method(
        "HINT: `grad_cam`, `hint`", lambda: {"source": "grad_cam", "loss": MSE()}, (0.1, 1.0, 10.0)
    ),
    "layer_attention": Method(
        "`layer_attention`, `cosine`",
        lambda: {"source": "layer_attention", "loss": "cosine"},
        (0.1, 1.0, 10.0),
    ),
    "swap": Method(
        "`SwapOutside`: images with the outside of others, as augmentation", None, exchange="images"
    ),
    "right_for_real": Method(
        "the recipe `right-for-real`: images also with the outside of others, exchanged where positions see "
        "little, and the divergence of the predictions",
        None,
        RECIPE,
        exchange="predictions",
        layer="local",
    ),
    "right_for_real_half": Method(
        "the same with half of the images", None, RECIPE, exchange="predictions", layer="local", share=0.5
    ),
    "intervention": Method(
        "the same with images exchanged, not features", None, (1.0, 4.0, 10.0), exchange="predictions"
    ),
    "intervention_most": Method(
        "the same with nine in ten images", None, RECIPE, exchange="predictions", share=0.9
    ),
    "intervention_half": Method(
        "the same with half of the images", None, RECIPE, exchange="predictions", share=0.5
    ),
    "intervention_middle": Method(
        "features of `blocks.3` exchanged",
        None,
        RECIPE,
        exchange="predictions",
        layer=MIDDLE,
        tasks=BIRDS_ONLY,
    ),
    "alone": Method("the ceiling: outside grey in training and test", None, alone=True, tasks=PHOTOGRAPHS),
    "grey": Method("outside grey, in half of the images", None, augment=_grey, tasks=BIRDS_ONLY),
    "blurred": Method("outside blurred, in half of the images", None, augment=_blurred, tasks=BIRDS_ONLY),
    "cropped": Method(
        "cropped to the object's box, half of the images", None, augment=_cropped, tasks=BIRDS_ONLY
    ),
    "reweighted": Method(
        "group labels: each group the same weight", None, groups="weights", tasks=BIRDS_ONLY
    ),
    "dro": Method("group labels: GroupDRO", None, groups="dro", tasks=BIRDS_ONLY),
    "signed_evidence": Method(
        "the recipe `signed-evidence`, layer `auto`",
        lambda: {
            name: value for name, value in load_recipe("signed-evidence").guide.items() if name != "weight"
        },
        (1.0, 10.0),
        tasks=BIRDS_ONLY,
    ),
    "evidence_absolute": Method(
        "signed evidence at `blocks.3`, all classes, not scaled",
        _at(MIDDLE, HiResCAM(relu=False), Outside(scale="none"), targets="all"),
        (1.0, 100.0),
        tasks=BIRDS_ONLY,
    ),
    "energy_last": Method(
        "`grad_cam`, `energy`, at `blocks.6`", _at(LAST, "grad_cam", "energy"), (0.1, 1.0), tasks=BIRDS_ONLY
    ),
    "energy_middle": Method(
        "`hires_cam`, `energy`, at `blocks.3`",
        _at(MIDDLE, "hires_cam", "energy"),
        (0.1, 1.0),
        tasks=BIRDS_ONLY,
    ),
    "l1_last": Method(
        "`grad_cam`, `l1`, at `blocks.6`", _at(LAST, "grad_cam", "l1"), (0.1, 1.0), tasks=BIRDS_ONLY
    ),
    "ppce_last": Method(
        "`grad_cam`, `ppce`, at `blocks.6`", _at(LAST, "grad_cam", "ppce"), (0.1, 1.0), tasks=BIRDS_ONLY
    ),
}


def methods_for(task: str) -> list[str]:
    """Names of the methods that a task has."""
    return [name for name, method in METHODS.items() if not method.tasks or task in method.tasks]


# --------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    method: str
    weight: float
    seed: int
    choosing: bool
    data: str
    variant: str = "all"
    quick: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """The settings that identify the run among those of its task, as they are saved."""
        return {
            "method": self.method,
            "weight": self.weight,
            "seed": self.seed,
            "choosing": self.choosing,
            "variant": self.variant,
        }


class Trainer:
    """Trains a network, guided or not.

    Args:
        method: Method of guidance.
        task: Task to train for.
        weight: λ.
    """

    def __init__(self, method: Method, task: Task, weight: float) -> None:
        self.model, self.flips = task.network(), task.flips
        self.every, self.steps = method.every, 0
        self.swap = SwapOutside(partners="any") if method.exchange == "images" else None
        self.intervention: ag.Intervention | None = None
        if method.exchange == "predictions":
            swap = SwapOutside("other", probability=method.share)
            self.intervention = ag.Intervention(self.model, weight=weight, layer=method.layer, swap=swap)
        self.augment, self.by_group = method.augment, method.groups
        self.chances: Tensor | None = None
        self.guide: ag.Guide | None = None
        if method.guide is not None:
            self.guide = ag.Guide(self.model, weight=weight * method.every, **method.guide())
        self.optimizer = task.optimizer(self.model.parameters())

    def step(self, part: Part) -> None:
        if self.flips:
            part = flipped(part)
        masks = part.masks
        if part.annotated is not None:
            masks = torch.where(part.annotated[:, None, None] > 0, masks, torch.nan)
        if self.intervention is not None:
            both = self.intervention(part.images, part.labels, mask=masks)
            loss = F.cross_entropy(both.swapped, part.labels) + both.loss
        else:
            images = part.images if self.swap is None else self.swap(part.images, part.labels, masks).images
            if self.augment is not None:
                half = torch.rand(len(part)) < 0.5
                images = images.clone()
                images[half] = self.augment(images[half], part.masks[half, None])
            losses = F.cross_entropy(self.model(images), part.labels, reduction="none")
            loss = losses.mean() if self.by_group is None else self._grouped(losses, part)
        if self.guide is not None and self.steps % self.every == 0:
            loss = loss + self.guide.loss(part.labels, mask=part.masks, sample_weight=part.annotated)
        self.steps += 1
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def count(self, groups: Tensor | None) -> None:
        """See how many images of the training set each group has."""
        if self.by_group is not None and groups is not None:
            self.sizes = torch.bincount(groups).float()

    def _grouped(self, losses: Tensor, part: Part) -> Tensor:
        assert part.groups is not None
        members = F.one_hot(part.groups, len(self.sizes)).to(losses)
        if self.by_group == "weights":
            weights = (1 / self.sizes)[part.groups] * self.sizes.sum() / len(self.sizes)
            return (losses * weights).mean()
        # Means of the groups that are in the batch; the others keep their weight.
        means = losses @ members / members.sum(dim=0).clamp(min=1)
        if self.chances is None:
            self.chances = torch.ones(len(self.sizes)) / len(self.sizes)
        self.chances = self.chances * (0.01 * means.detach()).exp()
        self.chances = self.chances / self.chances.sum()
        return self.chances @ means


def flipped(part: Part) -> Part:
    """Mirror half of the images, with their masks."""
    chosen = (torch.rand(len(part)) < 0.5)[:, None, None]
    images = torch.where(chosen[:, None], part.images.flip(-1), part.images)
    return replace(part, images=images, masks=torch.where(chosen, part.masks.flip(-1), part.masks))


@torch.no_grad()
def predicted(model: nn.Module, part: Part) -> Tensor:
    model.eval()
    return torch.cat([model(images).argmax(dim=1) for images in part.images.split(1000)])


def exchanged(part: Part, task: Task) -> Part:
    """Images with what is outside their masks taken from others."""
    if task.inpainted:
        generator, several = torch.Generator().manual_seed(0), torch.arange(len(part)).repeat(4)
        draws = [  # few images, so several partners for each
            SwapOutside()(part.images, part.labels, part.masks, generator=generator).images for _ in range(4)
        ]
        return replace(part.select(several), images=torch.cat(draws))
    others = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    masks = part.masks[:, None]
    return replace(part, images=part.images * masks + part.images[others] * (1 - masks))


def run(what: Run) -> dict[str, Any]:
    """Train a network, and measure it after each epoch."""
    torch.set_num_threads(1)
    task, method = TASKS[what.task], METHODS[what.method]
    train, valid, test = task.parts(Path(what.data), what.seed, what.quick)
    if method.alone:
        train, valid, test = (
            replace(part, images=_grey(part.images, part.masks[:, None])) for part in (train, valid, test)
        )
    train = VARIANTS[what.variant](train, torch.Generator().manual_seed(what.seed))
    torch.manual_seed(what.seed)
    trainer = Trainer(method, task, what.weight)
    trainer.count(train.groups)
    # The faster layout on most processors; the numbers are the same.
    model = trainer.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    epochs = 1 if what.quick else task.epochs
    end = 0.05 if task.decay else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(trainer.optimizer, 1.0, end, max(1, epochs - 1))
    curve: dict[str, list[float]] = {"valid": [], "exchanged": [], "test": [], "worst": []}
    begun = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(train)).split(task.batch):
            trainer.step(train.select(index))
        schedule.step()
        for name, some in (("valid", valid), ("exchanged", exchanged(valid, task))):
            curve[name].append(float((predicted(model, some) == some.labels).float().mean()))
        if not what.choosing:
            predictions = predicted(model, test)
            curve["test"].append(float((predictions == test.labels).float().mean()))
            if test.groups is not None:
                by_group = ag.metrics.group_accuracy(predictions, test.labels, test.groups)
                curve["worst"].append(float(by_group.amin()))
    seconds = time.perf_counter() - begun
    if trainer.guide is not None:
        trainer.guide.remove()
    some = valid.select(torch.arange(min(LOOKED_AT, len(valid))))
    shown = ag.explain(model, some.images, "input_gradient", "labels", labels=some.labels)
    energy = float(ag.metrics.energy_in_mask(shown.maps[:, 0], some.masks).mean())
    record = {**what.key, "energy": energy, "curve": curve, "seconds": round(seconds, 1)}
    if task.folder and not what.choosing and what.variant == "all" and what.seed < AUDITED:
        audited = ag.audit(model, some.images, some.labels, some.masks, window=some.images.shape[-1] // 4)
        reliance = audited.outside
        record["audit"] = {
            "relies": bool(audited.reasons),
            "outside": reliance.share,
            "error": reliance.error,
        }
    return record


# -------------------------------------------------------------------------- results


def file_of(task: str) -> Path:
    return RESULTS / f"{task}.jsonl"


def records(task: str) -> list[dict[str, Any]]:
    """What was found so far; a line that was cut off is none."""
    found = []
    if file_of(task).exists():
        for line in file_of(task).read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def chosen(task: str, method: str) -> float | None:
    """λ by the validation split; None while runs are missing."""
    task, method = TASKS[task].weights_of or task, METHODS[method].like or method
    weights = METHODS[method].weights
    if len(weights) == 1:
        return weights[0]
    tried = {r["weight"]: r for r in records(task) if r["method"] == method and r["choosing"]}
    if not set(weights) <= set(tried):
        return None
    reached = {weight: tried[weight]["curve"]["exchanged"][-1] for weight in weights}
    best = max(reached.values())
    margin = (best * (1 - best) / TASKS[task].held_out) ** 0.5
    return max(weight for weight in weights if reached[weight] >= best - margin)


def work_through(runs: Iterable[Run], processes: int) -> None:
    """Do what is not done, and write each result as it comes."""
    waiting = [
        what
        for what in runs
        if what.quick or not any(r.items() >= what.key.items() for r in records(what.task))
    ]
    # Fresh processes: threads that are already running do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        going = {pool.submit(run, what): what for what in waiting}
        for number, future in enumerate(as_completed(going), start=1):
            what, record = going[future], future.result()
            if what.quick:
                print(json.dumps({"task": what.task, **record}), flush=True)
                continue
            RESULTS.mkdir(parents=True, exist_ok=True)
            with file_of(what.task).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            last = {name: f"{values[-1]:.4f}" for name, values in record["curve"].items() if values}
            named = f"{what.task} {what.method} λ={what.weight:g} seed {what.seed}"
            print(f"{number}/{len(waiting)} {named}: {last}", flush=True)


def spread(values: Sequence[float], scale: float = 100) -> str:
    return f"{scale * mean(values):.2f}" + (f" ± {scale * stdev(values):.2f}" if len(values) > 1 else "")


def finished(task: str, method: str, variant: str = "all") -> list[dict[str, Any]]:
    """The runs that count, with the λ that was chosen."""
    key = {"method": method, "weight": chosen(task, method), "variant": variant, "choosing": False}
    return [r for r in records(task) if r.items() >= key.items()]


def picked(record: dict[str, Any]) -> int:
    """The epoch of the highest accuracy on exchanged validation images, from 0."""
    exchanged = record["curve"]["exchanged"]
    return int(exchanged.index(max(exchanged)))


def last_of_worst(found: Sequence[dict[str, Any]]) -> float:
    """The mean accuracy of the worst group after the last epoch."""
    return mean(r["curve"]["worst"][-1] for r in found)


def summary(task: str) -> str:
    """A line for each method."""
    rows = {name: found for name in METHODS if (found := finished(task, name))}
    # Unguided, and what the objects alone allow.
    ends = [rows.get(name) for name in ("unguided", "alone")]
    gap = None if None in ends else [last_of_worst(found) for found in ends if found is not None]
    parts = {"test": "test accuracy, %", "worst": "worst group, %"}
    parts = {part: title for part, title in parts.items() if any(r[0]["curve"][part] for r in rows.values())}
    titles = [f"{title}{when}" for title in parts.values() for when in (", last epoch", ", picked epoch")]
    titles.append("gradient of the images in the mask, %")
    titles += ["of the gap in the worst group, %"] * (gap is not None)
    lines = [
        f"| method | λ | {' | '.join(titles)} | seeds |",
        f"|---|--:|{'--:|' * (len(titles) + 1)}",
    ]
    for name, found in rows.items():
        weight = f"{found[0]['weight']:g}" if METHODS[METHODS[name].like or name].weights != (1.0,) else ""
        cells = []
        for part in parts:
            cells.append(spread([r["curve"][part][-1] for r in found]))
            cells.append(spread([r["curve"][part][picked(r)] for r in found]))
        cells.append(spread([r["energy"] for r in found]))
        if gap is not None:
            cells.append(f"{100 * (last_of_worst(found) - gap[0]) / (gap[1] - gap[0]):.0f}")
        lines.append(f"| {METHODS[name].title} | {weight} | {' | '.join(cells)} | {len(found)} |")
    for name, value in TASKS[task].published.items():
        lines.append(f"| {name}, published | | {value} |{' |' * len(titles)}")
    return "\n".join(lines)


def curves(task: str) -> str:
    """Test accuracy after each epoch, the mean over the seeds."""
    epochs = TASKS[task].epochs
    lines = [f"| method | {' | '.join(map(str, range(1, epochs + 1)))} |", f"|---|{'--:|' * epochs}"]
    for name, method in METHODS.items():
        found = [r["curve"]["test"] for r in finished(task, name)]
        if found:
            means = [f"{100 * mean(one[epoch] for one in found):.1f}" for epoch in range(epochs)]
            lines.append(f"| {method.title} | {' | '.join(means)} |")
    return "\n".join(lines)


def choice(task: str) -> str:
    """How λ was chosen."""
    lines = [
        "| method | λ | validation, % | exchanged, % | gradient of the images in the mask, % | chosen |",
        "|---|--:|--:|--:|--:|:-:|",
    ]
    for name, method in METHODS.items():
        for r in sorted(records(task), key=lambda r: r["weight"]):
            if r["choosing"] and r["method"] == name:
                mark = "●" if chosen(task, name) == r["weight"] else ""
                numbers = [r["curve"]["valid"][-1], r["curve"]["exchanged"][-1], r["energy"]]
                cells = " | ".join(f"{100 * number:.1f}" for number in numbers)
                lines.append(f"| {method.title} | {r['weight']:g} | {cells} | {mark} |")
    return "\n".join(lines)


def variants(task: str) -> str:
    """Accuracy with fewer masks, and with others, and the share of the gain; of groups, the worst."""
    names = [name for name in METHODS if any(finished(task, name, variant) for variant in list(VARIANTS)[1:])]
    unguided = finished(task, "unguided")
    if not names or not unguided:
        return ""
    part = "worst" if any(r["curve"]["worst"] for r in unguided) else "test"
    without = mean(r["curve"][part][-1] for r in unguided)
    lines = [
        f"| masks | {' | '.join(METHODS[name].title for name in names)} |",
        f"|---|{'--:|' * len(names)}",
    ]
    for variant in VARIANTS:
        cells = []
        for name in names:
            values = [r["curve"][part][-1] for r in finished(task, name, variant)]
            if not values:
                cells.append("")
                continue
            whole = mean(r["curve"][part][-1] for r in finished(task, name))
            share = (mean(values) - without) / (whole - without)
            seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
            cells.append(f"{spread(values)} ({share:.0%} of the gain; {seeds})")
        if any(cells):
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| unguided | {' | '.join([f'{100 * without:.1f}'] * len(names))} |"])


def audits(task: str) -> str:
    """Share of the predictions that depend on the outside, as the audit of each run says."""
    lines = [
        "| method | outside decides, less chance, % | the audit says that it relies on it |",
        "|---|--:|--:|",
    ]
    for name, method in METHODS.items():
        found = [r["audit"] for r in finished(task, name) if "audit" in r]
        if found:
            relies = sum(audit["relies"] for audit in found)
            outside = spread([audit["outside"] for audit in found])
            lines.append(f"| {method.title} | {outside} | {relies} of {len(found)} |")
    return "\n".join(lines)


def draw(task: str, path: Path) -> None:
    """Draw test accuracy after each epoch: means of the seeds, and all of them."""
    import matplotlib.pyplot as plt

    found = {name: [r["curve"]["test"] for r in finished(task, name)] for name in METHODS}
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for name, runs in found.items():
        if runs:
            epochs = range(1, len(runs[0]) + 1)
            means = [100 * mean(column) for column in zip(*runs, strict=True)]
            (line,) = axes.plot(epochs, means, marker="o", markersize=3, label=name)
            for one in runs:
                axes.plot(epochs, [100 * value for value in one], color=line.get_color(), alpha=0.25, lw=0.8)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=TASKS[task].about)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------- cost


def cost(
    name: str, methods: Sequence[str], data: Path, rounds: int, seconds: float, *, quick: bool
) -> dict[str, Any]:
    """Seconds of four training steps, by turns."""
    task = TASKS[name]
    torch.set_num_threads(1)
    device = torch.device("cpu")
    part = task.parts(data, 0, quick)[0].select(torch.arange(task.batch))

    def stepping(method: str) -> Callable[[], object]:
        torch.manual_seed(0)
        trainer = Trainer(METHODS[method], task, 1.0)
        trainer.count(part.groups)
        trainer.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda: [trainer.step(part) for _ in range(4)]

    calls = {method: stepping(method) for method in methods_for(name) if method in methods}
    calls["unguided again"] = stepping("unguided")
    return {**machine(device), "steps": compared(alternate(calls, device, rounds, seconds), "unguided")}


def cost_file(task: str) -> Path:
    return RESULTS / ("cost.json" if task == "decoy-cdep" else f"cost-{task}.json")


def cost_table(task: str) -> str:
    record = json.loads(cost_file(task).read_text(encoding="utf-8"))
    lines = ["| method | four steps |", "|---|--:|"]
    for name, found in record["steps"].items():
        title = METHODS[name].title if name in METHODS else name
        low, high = found["quartiles"]
        first = name == "unguided"
        lines.append(
            f"| {title} | {1000 * found['seconds']:.0f} ms |"
            if first
            else f"| {title} | {found['ratio']:.2f} ({low:.2f}–{high:.2f}) |"
        )
    return "\n".join(lines) + f"\n\n{describe(record)}."


def main() -> None:
    summaries: dict[str, Callable[[], str]] = {}
    for task in TASKS:
        for name, table in {
            "": summary,
            "-curves": curves,
            "-choice": choice,
            "-variants": variants,
            "-audits": audits,
            "-cost": cost_table,
        }.items():
            summaries[f"{task}{name}"] = partial(table, task)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="mnist.npz, or the folder of torchvision's MNIST; the folder of birds")
    add(
        "--tasks", nargs="+", choices=list(TASKS), default=[n for n, task in TASKS.items() if not task.folder]
    )
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--variants", nargs="+", choices=list(VARIANTS), default=["all"], help="what is done to the masks")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--processes", type=int, default=os.cpu_count() or 1)
    add("--cost", action="store_true", help="measure the time of a step instead")
    add("--quick", action="store_true", help="few images, one epoch, one λ; nothing written")
    add("--figures", action="store_true", help="run nothing, draw what was found into docs/images")
    add("--summary", choices=list(summaries), help="run nothing, print what was found")
    options = parser.parse_args()
    if options.summary:
        print(summaries[options.summary]())
        return
    if options.figures:
        for task in options.tasks:
            draw(task, FIGURES / f"effect-{task}.png")
        return
    if options.data is None:
        parser.error("--data is needed: mnist.npz, or the folder of torchvision's MNIST")
    if options.cost:
        task = options.tasks[0]
        found = cost(task, options.methods, options.data, 15, 120, quick=options.quick)
        RESULTS.mkdir(parents=True, exist_ok=True)
        cost_file(task).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    data, quick = str(options.data), options.quick
    if quick:
        kinds = [(t, name) for t in options.tasks for name in options.methods if name in methods_for(t)]
        runs = [Run(t, name, METHODS[name].weights[0], 0, False, data, quick=True) for t, name in kinds]
        work_through(runs, options.processes)
        return
    work_through(
        [
            Run(task, method, weight, CHOOSING, True, data)
            for task in options.tasks
            for method in options.methods
            if method in methods_for(task)
            and len(METHODS[method].weights) > 1
            and TASKS[task].weights_of is None
            for weight in METHODS[method].weights
        ],
        options.processes,
    )
    work_through(
        [
            Run(task, method, weight, seed, False, data, variant)
            for variant in options.variants
            for seed in options.seeds
            for task in options.tasks
            for method in options.methods
            if method in methods_for(task)
            and (weight := chosen(task, method)) is not None
            and (variant == "all" or METHODS[method].masked)
        ],
        options.processes,
    )
    for task in options.tasks:
        print(f"\n{TASKS[task].about}\n\n{summary(task)}")


if __name__ == "__main__":
    main()
