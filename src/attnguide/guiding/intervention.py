"""Guidance by intervention: a prediction should not change when what is outside of the mask is exchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attnguide import functional
from attnguide.capture.logits import LogitsSpec, check_spec, find_logits
from attnguide.capture.model_state import modules_of
from attnguide.capture.parallel import group_of, joint_sum, shards_of
from attnguide.errors import GuidanceError, InputError
from attnguide.functional import full_precision_mode, reading
from attnguide.guiding.terms import generator_of
from attnguide.masks.swapping import SwapOutside, Swapped
from attnguide.pairs import positives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Intervened", "Intervention"]


class Intervened(NamedTuple):
    """What an intervention gives for a batch.

    Attributes:
        loss: λ · mean divergence between the two predictions of an image, over the images that were
            exchanged; a scalar, an exact zero that can be differentiated if there are none.
        logits: Logits of the images, `(B, K)`.
        swapped: Logits of the same images with another outside, `(B, K)`; images that stayed as they are,
            such as those without a mask, are among them.
        batch: The images with another outside, their masks, and which were exchanged.
    """

    loss: Tensor
    logits: Tensor
    swapped: Tensor
    batch: Swapped


class Intervention:
    """Guides a classifier by what its predictions depend on: the outside is exchanged, not attributed.

    ```python
    intervention = ag.Intervention(model, weight=10.0)
    for images, labels, masks in loader:
        both = intervention(images, labels, mask=masks)
        loss = criterion(both.swapped, labels) + both.loss
        ...
    ```

    What the prediction owes to everything outside of the mask is how it changes when that comes from another
    image. The model runs once, on the images and on the same images with another outside, and the divergence
    between the two predictions is the loss. There is no map that could look right by itself, no layer to
    choose and no second derivative: a step takes about twice the time of a plain one, and any model will do.
    No hooks are put on the model. It may run under `torch.autocast`, and in `DataParallel` or
    `DistributedDataParallel` (give the wrapped model); with the latter the loss is that of the joint batch.

    With `criterion(both.swapped, labels)` the classifier learns from images whose surroundings say nothing,
    with `criterion(both.logits, labels)` from the images as they are.

    Args:
        model: Any classifier, as for [`Guide`][attnguide.Guide].
        weight: λ, at least 0.
        divergence: `"js"`, `"kl"` or `"logits"`; see
            [`functional.divergence`][attnguide.functional.divergence].
        swap: How the outside is exchanged; by default with images of another label,
            [`SwapOutside("other")`][attnguide.masks.SwapOutside].
        seed: Seed of the partners, at least 0. They depend on it, the step and the process alone, and take
            nothing from PyTorch's own random numbers.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain].
        process_group: As for [`Guide`][attnguide.Guide].

    Raises:
        InputError: If an argument has a wrong value.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        divergence: str = "js",
        swap: SwapOutside | None = None,
        seed: int = 0,
        logits: LogitsSpec = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight={weight!r} must be a finite number of at least 0.")
        if divergence not in functional.DIVERGENCES:
            raise InputError(f"divergence={divergence!r} is unknown: {', '.join(functional.DIVERGENCES)}.")
        if type(seed) is not int or seed < 0:
            raise InputError(f"seed={seed!r} must be a number of at least 0.")
        if swap is not None and not isinstance(swap, SwapOutside):
            raise InputError(f"swap={swap!r:.60} must be an attnguide.masks.SwapOutside.")
        check_spec(logits)
        self.model, self.weight, self.divergence, self.seed = model, weight, divergence, seed
        self.swap = SwapOutside("other") if swap is None else swap
        self._logits, self._process_group = logits, process_group
        self._steps = 0

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | np.ndarray[Any, Any] | Sequence[Any] | None,
    ) -> Intervened:
        """Run the model on images and on the same images with another outside, and compare its predictions.

        Args:
            images: `(B, C, H, W)`, floats.
            labels: Class indices `(B,)`, −100 for none; or multi-hot `(B, K)`, where each class is predicted
                by itself.
            mask: As for [`SwapOutside`][attnguide.masks.SwapOutside]; None: no image has one.

        Returns:
            The loss, both logits, and the exchanged images.

        Raises:
            InputError: If images, labels or masks do not fit.
            GuidanceError: If the logits have no graph, or other processes do not call it.
        """
        group = self._group()
        rank = 0 if group is None else dist.get_rank(group)
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        generator = generator_of(device, self.seed, self._steps, rank)
        with nullcontext() if self._steps else reading():  # values on an accelerator are checked once
            batch = self.swap(images, labels, mask, generator=generator)
        output = find_logits(self.model(torch.cat([images, batch.images])), self._logits)
        if not output.requires_grad:
            raise GuidanceError(
                "the logits have no graph: the model ran under torch.no_grad() or inference_mode(), or every "
                "parameter is frozen. Run an intervention with gradients enabled, and not in validation."
            )
        first, second = output.chunk(2)
        independent = positives(labels, first).ndim == 2
        with full_precision_mode(output.device):
            apart = functional.divergence(first, second, self.divergence, independent=independent)
            counted = batch.exchanged.to(apart)
            number = counted.sum()
            # The wrapper divides the sum of the gradients by the number of processes.
            share = 1 if group is None else dist.get_world_size(group)
            whole = number if group is None else joint_sum(number, group)
            loss = self.weight * share * (apart * counted).sum() / whole.clamp(min=1)
        self._steps += 1
        return Intervened(loss, first, second, batch)

    def _group(self) -> ProcessGroup | None:
        """The processes whose gradients are averaged; None for this one alone."""
        if self._process_group is not None:
            return self._process_group
        if isinstance(self.model, DistributedDataParallel):
            return self.model.process_group
        return group_of(shards_of(modules_of(self.model)))

    def __repr__(self) -> str:
        return f"Intervention({type(self.model).__name__}: {self.divergence} × {self.weight:g})"
