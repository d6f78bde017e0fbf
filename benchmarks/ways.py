"""The ways of explaining and guiding that are measured together, those of attnguide and of others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnguide as ag
import peers
from measuring import Call

SIZE = 224


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    seconds: float
    compile: bool

    def autocast(self) -> torch.autocast | nullcontext[None]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True)
class Case:
    """What to measure: a kind of call, and what it is called with."""

    section: str  # explain, many, loops, guide, first call
    model: str
    batch: int
    classes: int = 1
    layer: str = "auto"
    memory: bool = False

    @property
    def guided(self) -> bool:
        return self.section == "guide"

    @property
    def kind(self) -> str:
        return f"memory, {self.section}" if self.memory else self.section

    @property
    def subject(self) -> str:
        layer = "" if self.layer == "auto" else f", {self.layer}"
        classes = f", {self.classes} classes" if self.classes > 1 else ""
        return f"{self.model}{layer}{classes}, batch {self.batch}"


@dataclass(frozen=True)
class Batch:
    """Random images, and labels and masks to guide with; labels are multi-hot if there are many classes."""

    images: Tensor
    labels: Tensor
    masks: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Batch:
        images = torch.randn(case.batch, 3, SIZE, SIZE, device=device)
        labels = masks = torch.empty(0, device=device)
        if case.guided and case.classes == 1:
            labels = torch.randint(1000, (case.batch,), device=device)
            masks = torch.rand(case.batch, SIZE, SIZE, device=device)
        elif case.guided:
            labels = torch.randint(2, (case.batch, case.classes), device=device).float()
            masks = torch.rand(case.batch, case.classes, SIZE // 4, SIZE // 4, device=device)
        return cls(images, labels, masks)


def build(case: Case, device: torch.device) -> nn.Module:
    logits = case.classes if case.guided and case.classes > 1 else 1000
    model: nn.Module = timm.create_model(case.model, num_classes=logits)
    return model.to(device).train(case.guided)


@cache
def layer_of(model: str) -> str:
    """The layer that attnguide takes: the others are given the same."""
    case = Case("explain", model, 2)
    device = torch.device("cpu")
    return ag.explain(build(case, device), Batch.of(case, device).images, targets=[0]).layer


# ------------------------------------------------------------- ways to explain

Maker = Callable[[Case, Settings, nn.Module, Batch], Call]


def infer(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
    def call() -> object:
        with torch.inference_mode(), settings.autocast():
            return model(batch.images)

    return call


def explain(case: Case, settings: Settings, model: nn.Module, batch: Batch, *, small: bool = False) -> Call:
    def call() -> object:
        with settings.autocast():
            # Resized to the image, as the peers give them, or as small as the layer is.
            found = ag.explain(model, batch.images, targets=list(range(case.classes)))
            return found.raw if small else found.maps

    return call


def explain_like(explainer: peers.Explainer) -> Maker:
    def make(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
        layer, view = layer_of(case.model), peers.view_of(case.model)

        def call() -> object:
            with settings.autocast():
                return explainer(model, batch.images, layer, view, range(case.classes))

        return call

    return make


# --------------------------------------------------------------- ways to guide


def step(settings: Settings, model: nn.Module, loss: Callable[[], Tensor]) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def call() -> None:
        with settings.autocast():
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


def train(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
    return step(settings, model, lambda: criterion(model(batch.images), batch.labels))


def train_compiled(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
    compiled = torch.compile(model)
    return step(settings, model, lambda: criterion(compiled(batch.images), batch.labels))


def guide(
    case: Case, settings: Settings, model: nn.Module, batch: Batch, *, compiled: bool = False, **options: Any
) -> Call:
    targets = "labels" if case.classes == 1 else "all"
    guide = ag.Guide(model, layer=case.layer, targets=targets, **options)
    if compiled:
        guide.compile(batch.images)

    def loss() -> Tensor:
        fit = criterion(model(batch.images), batch.labels)
        return fit + guide.loss(batch.labels, mask=batch.masks)

    return step(settings, model, loss)


def guide_by_second_forward(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
    layer = layer_of(case.model) if case.layer == "auto" else case.layer
    view = peers.view_of(case.model)

    def loss() -> Tensor:
        fit = criterion(model(batch.images), batch.labels)
        return fit + peers.second_forward(model, batch.images, batch.labels, batch.masks, layer, view)

    return step(settings, model, loss)


def guide_by_input_gradient(case: Case, settings: Settings, model: nn.Module, batch: Batch) -> Call:
    def loss() -> Tensor:
        images = batch.images.detach().requires_grad_()
        logits = peers.twice_differentiable(model, images)
        return criterion(logits, batch.labels) + peers.input_gradient(
            logits, images, batch.labels, batch.masks
        )

    return step(settings, model, loss)


def ways(case: Case, settings: Settings) -> dict[str, Maker]:
    """Return the ways to be measured for a case; the others are compared with the first."""
    plain = train if case.guided else infer
    found: dict[str, Maker] = {"plain": plain}
    if not case.memory:
        found["plain again"] = plain
    if case.guided:
        if case.layer == "input":
            return {**found, "attnguide": partial(guide, source="input_gradient")}
        found["attnguide"] = guide
        if settings.compile:
            found["plain, compiled"] = train_compiled
            if hasattr(ag.Guide, "compile"):
                found["attnguide, compiled"] = partial(guide, compiled=True)
        found["second forward"] = guide_by_second_forward
        if case.layer == "auto":  # it looks at no layer
            found["input gradient"] = guide_by_input_gradient
        return found
    # Of the others, only torch-cam can go on with a graph that it has.
    names = ("torch-cam",) if case.section == "many" else tuple(peers.EXPLAINERS)
    others = {name: explain_like(peers.EXPLAINERS[name]) for name in names if name in peers.EXPLAINERS}
    ours = {"attnguide": explain, "attnguide, layer's size": partial(explain, small=True)}
    return {**found, **ours, **others}


def make_way(maker: Maker, case: Case, settings: Settings) -> tuple[Call, int]:
    """Make a call with a separate model, so that hooks do not interfere, and return the bytes it holds."""
    torch.manual_seed(0)
    model, batch = build(case, settings.device), Batch.of(case, settings.device)
    held = [*model.parameters(), *model.buffers(), *vars(batch).values()]
    return maker(case, settings, model, batch), sum(tensor.nbytes for tensor in held)
