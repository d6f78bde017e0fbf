"""The training loop: steps with guidance by maps or by intervention, and measurements between epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from attnguide import functional, metrics
from attnguide.capture.logits import LogitsSpec, find_logits
from attnguide.capture.model_state import evaluating
from attnguide.errors import GuidanceError, InputError, LayerError, MissingPackageError
from attnguide.explanation import explain
from attnguide.guiding.guide import Guide
from attnguide.guiding.intervention import Intervention
from attnguide.interfaces import TargetPrior
from attnguide.pairs import IGNORE_INDEX, resolve
from attnguide.trace import Trace
from attnguide.training.images import Batch, seeding

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Measured", "Trainer", "accelerator_on", "joined", "united"]

#: So often a loss on an accelerator is read, to see that it is finite.
_READ_EVERY = 20
#: Largest number of validation images whose maps are computed only to be measured.
_LOOKED_AT = 256


def accelerator_on(device: torch.device | None = None, precision: str | None = None) -> Accelerator:
    """Return an accelerator of Accelerate, for a device or, where there are several processes, for this one.

    Args:
        device: The device; by default what Accelerate chooses.
        precision: `"no"`, `"bf16"` or `"fp16"`; None for what `accelerate launch` says.

    Raises:
        MissingPackageError: If Accelerate is not installed.
        InputError: If the precision does not work here.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ModuleNotFoundError as error:
        raise MissingPackageError("training", error.name or "accelerate", "train") from error
    # Settings are kept for the whole process; a training of its own may have others.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        return Accelerator(mixed_precision=precision, cpu=device is not None and device.type == "cpu")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"train.precision = {precision!r} cannot be used here: {error}") from error


def joined(prior: TargetPrior, batch: Batch, classes: int) -> Tensor:
    """Where a prior says that an image should be looked at for its class, or for any of several attributes.

    Args:
        prior: The prior; it may read the images and the annotations, but no feature.
        batch: The batch.
        classes: Number of classes.

    Returns:
        `(B, H, W)` in [0, 1], NaN where it says nothing.
    """
    size = (batch.images.shape[-2], batch.images.shape[-1])
    logits = batch.images.new_zeros(len(batch.images), classes)
    pairs = resolve("labels" if batch.labels.ndim == 1 else "all", logits, batch.labels, "logit")
    wanted = {name: value for name, value in batch.annotations.items() if name in prior.annotations}
    given = prior(Trace(batch.images, logits, {}), pairs, size, **wanted)
    maps, weights = given if isinstance(given, tuple) else (given, given.new_ones(len(given)))
    if pairs.present is not None:
        weights = weights * pairs.present
    found = torch.full((len(batch.images), *size), -1.0, device=maps.device)
    said = torch.where((weights > 0)[:, None, None], maps, -1.0).float()
    found.scatter_reduce_(0, pairs.sample[:, None, None].expand_as(said), said, "amax")
    return found.masked_fill(found < 0, math.nan)


@dataclass
class Measured:
    """Measurements of an epoch; None where something was not measured.

    Attributes:
        loss: Mean classification loss of the training.
        guidance: Mean guidance loss, with guidance by maps not multiplied by λ.
        energy: Mean share of the attribution inside the regions.
        iou: Mean soft IoU of attribution and regions.
        accuracy: Share of the labels that are predicted right.
        swapped: The same on images with exchanged surroundings.
        swapped_error: Its standard error.
    """

    loss: float | None = None
    guidance: float | None = None
    energy: float | None = None
    iou: float | None = None
    accuracy: float | None = None
    swapped: float | None = None
    swapped_error: float | None = None


class _Mean:
    """A running mean that reads no value from the device before its end."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | float = 0.0

    def add(self, values: Tensor, count: Tensor | None = None) -> None:
        """Add values, or their sum and its count."""
        self._sum = self._sum + values.detach().double().sum()
        self._count = self._count + (values.numel() if count is None else count)

    def state(self) -> list[float]:
        return [float(self._sum), float(self._count)]

    def load(self, state: Sequence[float]) -> None:
        self._sum, self._count = state

    @property
    def value(self) -> float | None:
        return float(self._sum) / float(self._count) if float(self._count) else None


@dataclass
class Trainer:
    """Trains a model step by step, guided or not.

    Attributes:
        model: The model, wrapped for several processes if there are such.
        optimizer: The optimizer.
        accelerator: What moves, scales and averages.
        guidance: A guide or an intervention on the model; None without guidance.
        task_weight: Weight of the classification loss.
        logits: Which part of the model's output is the logits.
        prior: Where the model should look in validation images, for exchanged surroundings; by default that
            of the guide, or the masks.
        schedule: Called with the number of steps that are done, to set the learning rate.
        clip: Largest norm of the gradient.
        seed: Seed of the steps.
        steps: Number of steps that are done.
        epochs: Number of epochs that are finished.
    """

    model: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    guidance: Guide | Intervention | None = None
    task_weight: float = 1.0
    logits: LogitsSpec = None
    prior: TargetPrior | None = None
    schedule: Callable[[int], object] | None = None
    clip: float | None = None
    seed: int = 0
    steps: int = 0
    epochs: int = 0
    _begun: int = 0
    _means: dict[str, _Mean] = field(default_factory=lambda: {"loss": _Mean(), "guidance": _Mean()})

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def unwrapped(self) -> nn.Module:
        """The model without a wrapper for several processes."""
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module

    def step(self, parts: Sequence[Batch]) -> None:
        """Make a step of the optimizer with the gradients of one or several parts.

        Raises:
            GuidanceError: If a loss is not finite.
            InputError: If labels or annotations do not fit.
        """
        seeding(self.seed, self.steps, self.accelerator.process_index)
        parts = [part.to(self.device) for part in parts]
        known = torch.stack([_known(part.labels).sum() for part in parts]).sum()
        if self.accelerator.num_processes > 1:
            known = self.accelerator.reduce(known, "sum")
        # The wrapper divides the sum of the gradients by the number of processes.
        share = self.task_weight * self.accelerator.num_processes / known.clamp(min=1)
        whole: list[float] = []
        total: Tensor | float = 0.0
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                logits, guided = self._forward(part, parts, whole)
                task = _cross_entropy(logits, part.labels)
                loss = share * task + guided
                self.accelerator.backward(loss)
            self._means["loss"].add(task, _known(part.labels).sum())
            total = total + loss.detach()
        self._check_finite(total)
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.schedule is not None:
            self.schedule(self.steps)

    def _forward(self, part: Batch, parts: Sequence[Batch], whole: list[float]) -> tuple[Tensor, Tensor]:
        """Return the logits that the classification learns from, and the guidance loss.

        Args:
            part: The part.
            parts: All parts of the step.
            whole: Number of annotated pairs in all parts, for each term; empty at first.
        """
        guidance = self.guidance
        if isinstance(guidance, Intervention):
            with self.accelerator.autocast():
                both = guidance(part.images, part.labels, mask=united(part.annotations.get("mask")))
            self._means["guidance"].add(both.loss)
            return both.swapped.float(), both.loss / len(parts)
        with self.accelerator.autocast():
            logits = find_logits(self.model(part.images), self.logits).float()
        if guidance is None:
            return logits, logits.new_zeros(())
        if len(parts) > 1 and not whole:  # after a first pass, which finds the layers
            counts = [guidance.count(each.images, each.labels, **each.annotations) for each in parts]
            whole += [sum(each) for each in zip(*counts, strict=True)]
        loss = guidance.loss(part.labels, normalize_by=whole or None, **part.annotations)
        for record in guidance.records():
            self._means["guidance"].add(record.losses)
        return logits, loss

    def _classes(self, part: Batch) -> int:
        if part.labels.ndim == 2:
            return part.labels.shape[1]
        if not hasattr(self, "_outputs"):
            with torch.no_grad(), evaluating(self.unwrapped):
                self._outputs = find_logits(self.unwrapped(part.images[:1]), self.logits).shape[1]
        return self._outputs

    def _check_finite(self, total: Tensor | float) -> None:
        if not isinstance(total, Tensor) or (total.device.type != "cpu" and self.steps % _READ_EVERY):
            return
        if not bool(torch.isfinite(total)):
            raise GuidanceError(
                f"the loss is not finite in epoch {self.epochs + 1}, step {self.steps - self._begun + 1}: "
                f"{total.item():g}. Lower learning_rate or the weights, look for NaN or infinity in the "
                "images and the model, or leave out the reduced precision."
            )

    def finish_epoch(self) -> Measured:
        """Return the mean losses since the last call, of all processes."""
        self.epochs, self._begun = self.epochs + 1, self.steps
        if self.accelerator.num_processes > 1:
            for mean in self._means.values():
                state = torch.tensor(mean.state(), device=self.device)
                mean.load(self.accelerator.reduce(state, "sum").tolist())
        found = Measured(self._means["loss"].value, self._means["guidance"].value)
        for loss in (found.loss, found.guidance):
            self._check_finite(torch.tensor(loss or 0.0))
        self._means = {"loss": _Mean(), "guidance": _Mean()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what the training has changed: plain values and tensors."""
        scaler = self.accelerator.scaler
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "begun": self._begun,
            "model": self.unwrapped.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guidance": None if self.guidance is None else self.guidance.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "means": {name: mean.state() for name, mean in self._means.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a training with the same settings was."""
        self.steps, self.epochs, self._begun = state["steps"], state["epochs"], state["begun"]
        self.unwrapped.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.guidance is not None:
            self.guidance.load_state_dict(state["guidance"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, mean in self._means.items():
            mean.load(state["means"][name])

    # --------------------------------------------------------------- measuring

    def measure(
        self,
        batches: Iterable[Batch],
        *,
        swapped: metrics.SwappedAccuracy | None = None,
        batch_size: int = 32,
        on_batch: Callable[[], object] = lambda: None,
    ) -> Measured:
        """Measure the model on validation images, in evaluation mode; the training goes on as if nothing was.

        Args:
            batches: The images.
            swapped: Also measures the accuracy with exchanged surroundings, in batches of images with masks.
            batch_size: Number of images of these batches.
            on_batch: Called after each batch.
        """
        found = {name: _Mean() for name in ("accuracy", "energy", "iou")}
        held = _Held(swapped, batch_size)
        with evaluating(self.unwrapped), self._as_before(), functional.reading():
            for batch in batches:
                batch = batch.to(self.device)
                logits = self._measure_batch(batch, found)
                found["accuracy"].add(_right(logits, batch.labels))
                if swapped is not None:
                    held.add(batch, self._masks(batch))
                on_batch()
            held.finish()
        result = Measured(**{name: mean.value for name, mean in found.items()})
        if swapped is not None and int(swapped.count):
            result.swapped, result.swapped_error = float(swapped.compute()), float(swapped.standard_error)
            swapped.reset()
        return result

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Give a guide its number of steps back, on which draws and warm-up depend."""
        guide = self.guidance if isinstance(self.guidance, Guide) else None
        before = None if guide is None else guide.state_dict()
        try:
            yield
        finally:
            if guide is not None and before is not None:
                guide.load_state_dict(before)

    def _measure_batch(self, batch: Batch, found: Mapping[str, _Mean]) -> Tensor:
        """Return the logits, and measure maps where there are regions."""
        guide = self.guidance if isinstance(self.guidance, Guide) else None
        looks = guide is not None and all(
            bound.loss.reads_prior and _reads(bound.prior, batch) for bound in guide._bound
        )
        with torch.set_grad_enabled(looks), self.accelerator.autocast():
            logits = find_logits(self.unwrapped(batch.images), self.logits).float()
        if looks and guide is not None:
            guide.loss(batch.labels, **batch.annotations)
            for record in guide.records():
                if len(record.pairs):
                    found["iou"].add((-functional.iou_loss(record.maps, record.prior)).exp())
                    found["energy"].add(_energy(record.maps, record.prior))
        elif guide is None and batch.labels.ndim == 1 and found["energy"].state()[1] < _LOOKED_AT:
            self._look(batch, found["energy"])
        return logits.detach()

    def _look(self, batch: Batch, energy: _Mean) -> None:
        """Measure the energy of Grad-CAM in the masks, where no guide computes maps."""
        masks = united(batch.annotations.get("mask"))
        if masks is None:
            return
        given = ((masks > 0).flatten(1).any(dim=1) & (batch.labels != IGNORE_INDEX)).nonzero()[:, 0]
        if not len(given):
            return
        pairs = [(row, int(batch.labels[index])) for row, index in enumerate(given.tolist())]
        try:
            shown = explain(self.unwrapped, batch.images[given], "grad_cam", pairs, logits=self.logits)
        except LayerError:
            return  # a model without rows and columns has no such map
        energy.add(_energy(shown.maps[:, 0], masks[given]))

    def _masks(self, batch: Batch) -> Tensor | None:
        """A mask for each image `(B, H, W)`, NaN where there is none, from the masks or any prior."""
        prior = self.prior
        if prior is None and isinstance(self.guidance, Guide) and self.guidance._bound[0].loss.reads_prior:
            prior = self.guidance._bound[0].prior
        if prior is None:
            return united(batch.annotations.get("mask"))
        return joined(prior, batch, self._classes(batch))


class _Held:
    """Gathers images with masks into batches of one size, since others have no partner."""

    def __init__(self, metric: metrics.SwappedAccuracy | None, size: int) -> None:
        self.metric, self.size = metric, size
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Batch, masks: Tensor | None) -> None:
        if masks is None:
            return
        given = (masks > 0).flatten(1).any(dim=1)
        self.parts.append((batch.images[given], batch.labels[given], masks[given]))
        # What is left at the end joins the last batch.
        while sum(len(images) for images, _, _ in self.parts) >= 2 * self.size:
            images, labels, masks = self._joined()
            self._measure(images[: self.size], labels[: self.size], masks[: self.size])
            self.parts = [(images[self.size :], labels[self.size :], masks[self.size :])]

    def finish(self) -> None:
        if self.parts:
            self._measure(*self._joined())

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, masks = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        return images, labels, masks

    def _measure(self, images: Tensor, labels: Tensor, masks: Tensor) -> None:
        if self.metric is not None and len(images) > 1:
            self.metric.update(images, labels, masks)


def united(mask: Any) -> Tensor | None:
    """Join the masks of an image's classes: `(B, H, W)`, NaN where an image has none; None without any."""
    if mask is None or isinstance(mask, Tensor):
        if mask is not None and mask.ndim == 4:
            joined = mask.nan_to_num(-1.0).amax(dim=1)
            return joined.masked_fill(joined < 0, math.nan)
        return mask
    planes = [None if each is None else torch.stack(list(each.values())).amax(dim=0) for each in mask]
    shape = next((plane.shape for plane in planes if plane is not None), None)
    if shape is None:
        return None
    return torch.stack([torch.full(shape, math.nan) if plane is None else plane for plane in planes])


def _reads(prior: TargetPrior, batch: Batch) -> bool:
    """Whether a batch has what a prior needs; masks, unless it has a template of them."""
    needs = [name for name, required in prior.annotations.items() if required or name == "mask"]
    has_template = getattr(prior, "template", None) is not None
    return all(name in batch.annotations or (name == "mask" and has_template) for name in needs)


def _energy(maps: Tensor, masks: Tensor) -> Tensor:
    sized = functional.resize(maps.relu(), (masks.shape[-2], masks.shape[-1]))
    return metrics.energy_in_mask(sized, masks)


def _known(labels: Tensor) -> Tensor:
    return labels != IGNORE_INDEX if labels.ndim == 1 else ~labels.isnan()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the known labels."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    weight = (~labels.isnan()).float()
    return F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), weight=weight, reduction="sum")


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each known label is predicted."""
    right = logits.argmax(dim=1) == labels if labels.ndim == 1 else (logits > 0) == (labels > 0.5)
    return right[_known(labels)].double()
