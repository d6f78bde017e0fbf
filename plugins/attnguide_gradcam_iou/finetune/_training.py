"""The training loop: epochs of training and validation, with and without masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from attnguide import Guide, functional
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.errors import GuidanceError, InputError
from attnguide.pairs import IGNORE_INDEX
from attnguide.priors.mask import MaskPrior
from attnguide_gradcam_iou.finetune._data import Batch, batches

__all__ = ["Trainer", "seeded"]


@dataclass(frozen=True)
class Trainer:
    """Trains a guided model, one epoch after the other; `amp` is for bfloat16 where that is safe."""

    model: nn.Module
    guide: Guide
    optimizer: Optimizer
    attribute_weight: float
    device: torch.device
    amp: bool

    @property
    def _has_template(self) -> bool:
        prior = self.guide.terms[0].prior
        return isinstance(prior, MaskPrior) and prior.template is not None

    @property
    def _needs_masks(self) -> bool:
        prior = self.guide.terms[0].prior
        return prior == "mask" or (isinstance(prior, MaskPrior) and prior.template is None)

    def check(self, loader: DataLoader[Any]) -> None:
        """Refuse data that do not fit the model, and a guidance that reaches no weight.

        Raises:
            InputError: If the data do not fit.
            GuidanceError: If the guidance reaches no weight.
        """
        for batch in batches(loader, self.device):
            if batch.masks is not None and self._has_template:
                raise InputError("the data give masks, and there is a template too. Give one of them.")
            if batch.masks is None and self._needs_masks:
                raise InputError(
                    "there are no regions to look at. Give template=, or data of (image, attributes, mask)."
                )
            if self._needs_masks and not batch.painted:
                continue  # masks may be rare
            with torch.no_grad(), evaluating(self.model):
                count = find_logits(self.model(batch.images)).shape[1]
            if batch.attributes.ndim == 1 and int(batch.attributes.max()) >= count:
                raise InputError(
                    f"the data give class {int(batch.attributes.max())}, but the model has {count} outputs. "
                    f"Give it a head: with_head(model, {int(batch.attributes.max()) + 1})."
                )
            if batch.attributes.ndim == 2 and batch.attributes.shape[1] != count:
                raise InputError(
                    f"attributes have shape {tuple(batch.attributes.shape)}, but the model has {count} "
                    f"outputs. Give it a head: with_head(model, {batch.attributes.shape[-1]})."
                )
            if any(term.weight > 0 for term in self.guide.terms):
                self.guide.check(batch.images, batch.attributes, **batch.annotations)
            return
        raise InputError("no sample of the training data has a mask, or there is no sample.")

    def train(
        self, loader: DataLoader[Any], epoch: int, on_step: Callable[[int], None]
    ) -> tuple[float, float]:
        """Train on the data once; return mean attribute loss, and mean guidance loss of the pairs.

        Raises:
            GuidanceError: If a loss is not finite.
        """
        self.model.train()
        attribute, guidance = _Mean(), _Mean()
        for number, batch in enumerate(batches(loader, self.device), 1):
            logits = self._forward(batch)
            cross_entropy = _cross_entropy(logits, batch.attributes)
            guided = self.guide.loss(batch.attributes, **batch.annotations)
            _check_finite(cross_entropy, guided, epoch, number)
            self.optimizer.zero_grad()
            (self.attribute_weight * cross_entropy + guided).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            attribute.add(cross_entropy.detach()[None])
            guidance.add(self.guide.records()[0].losses)
            on_step(epoch)
        return attribute.value, guidance.value

    def validate(
        self, loader: DataLoader[Any], epoch: int, on_step: Callable[[int], None]
    ) -> tuple[float, float | None]:
        """Return the share of labels that are predicted right, and the mean soft IoU."""
        self.model.eval()
        right, overlap = _Mean(), _Mean()
        measured = False
        for batch in batches(loader, self.device):
            masked = batch.masks is not None or not self._needs_masks
            # Grad-CAM needs a graph.
            with torch.set_grad_enabled(masked):
                logits = self._forward(batch)
                right.add(_right(logits, batch.attributes))
                if masked:
                    self.guide.loss(batch.attributes, **batch.annotations)
                    record = self.guide.records()[0]
                    overlap.add((-functional.iou_loss(record.maps, record.prior)).exp())
                    measured = True
            on_step(epoch)
        return right.value, overlap.value if measured else None

    def _forward(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return find_logits(self.model(batch.images)).float()


def _check_finite(attribute: Tensor, guidance: Tensor, epoch: int, step: int) -> None:
    if bool(torch.isfinite(attribute + guidance)):
        return
    raise GuidanceError(
        f"the loss is not finite in epoch {epoch}, step {step}: attribute loss {attribute.item():g}, "
        f"guidance loss {guidance.item():g}. Lower learning_rate= or the weights, look for NaN or infinity "
        "in the images and the model, or leave out amp=."
    )


def _cross_entropy(logits: Tensor, attributes: Tensor) -> Tensor:
    """Mean over the known labels."""
    if attributes.ndim == 1:
        known = attributes != IGNORE_INDEX
        total = F.cross_entropy(logits, attributes, ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        known = ~attributes.isnan()
        total = F.binary_cross_entropy_with_logits(
            logits, attributes.nan_to_num(), weight=known.float(), reduction="sum"
        )
    return total / known.sum().clamp(min=1)


def _right(logits: Tensor, attributes: Tensor) -> Tensor:
    """Whether each known label is predicted."""
    if attributes.ndim == 1:
        return (logits.argmax(dim=1) == attributes)[attributes != IGNORE_INDEX]
    return ((logits > 0) == (attributes > 0.5))[~attributes.isnan()]


class _Mean:
    """A running mean that reads no value from the device before its end."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, values: Tensor) -> None:
        self._sum = self._sum + values.float().sum()
        self._count += values.numel()

    @property
    def value(self) -> float:
        return float(self._sum) / self._count if self._count else math.nan


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
