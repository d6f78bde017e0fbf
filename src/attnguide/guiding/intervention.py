"""Guidance by intervention: a prediction should not change when what is outside of the mask is exchanged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attnguide import functional
from attnguide.capture.calls import INPUT, Call, Tap, images_name, replace, select, tensors_in
from attnguide.capture.logits import LogitsSpec, check_spec, find_logits
from attnguide.capture.model_state import modules_of, unwrap
from attnguide.capture.own_hooks import Handles, in_this_thread
from attnguide.capture.parallel import group_of, joint_sum, shards_of
from attnguide.errors import AttnGuideError, GuidanceError, InputError, nearest
from attnguide.functional import full_precision_mode, reading
from attnguide.guiding import state as states
from attnguide.guiding.recipe import load_recipe
from attnguide.guiding.terms import generator_of
from attnguide.layers._reach import find_local
from attnguide.layers.finding import check_layer, find_layers
from attnguide.masks.swapping import Exchange, SwapOutside, Swapped
from attnguide.pairs import positives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Intervened", "Intervention"]

#: The layer is found with the first images.
LOCAL = "local"


class Intervened(NamedTuple):
    """What an intervention gives for a batch.

    Attributes:
        loss: λ · mean divergence between the two predictions of an image, over the images that were
            exchanged; a scalar, an exact zero that can be differentiated if there are none.
        logits: Logits of the images, `(B, K)`.
        swapped: Logits of the same images with another outside, `(B, K)`; of images that stayed as they are,
            such as those without a mask, the same as `logits`.
        batch: The images with another outside (as they are, if features are exchanged instead), their masks,
            and which were exchanged.
    """

    loss: Tensor
    logits: Tensor
    swapped: Tensor
    batch: Swapped


def _checked(model: nn.Module, layer: str) -> str:
    """Return a layer as the unwrapped model knows it; a local one is not found yet."""
    return LOCAL if layer == LOCAL else check_layer(model, [layer])[0]


def arguments_of(settings: Mapping[str, Any], empty: Literal["error", "skip"] = "error") -> dict[str, Any]:
    """Turn the settings of a recipe into arguments of an [`Intervention`][attnguide.Intervention].

    Args:
        settings: The table `[intervention]`.
        empty: What to do with empty masks, as for [`SwapOutside`][attnguide.masks.SwapOutside].
    """
    arguments = dict(settings)
    swap: dict[str, Any] = {"partners": "other", "empty": empty}
    swap |= {name: arguments.pop(name) for name in ("partners", "probability") if name in arguments}
    return {**arguments, "swap": SwapOutside(**swap)}


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
    choose and no second derivative: a step takes about twice the time of a plain one, less where not every
    image has a mask, and any model will do. It may run under `torch.autocast`, and in `DataParallel` or
    `DistributedDataParallel` (give the wrapped model); with the latter the loss is that of the joint batch.

    With `layer=`, the features of that layer are exchanged, and the images stay as they are. What comes
    before the layer then runs once, so a step is cheaper, the later the layer; but positions inside the mask
    may have seen the outside already. `layer="local"` takes the deepest whose positions see little. Nothing
    stays on the model after the call.

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
        layer: What is exchanged: the images, `"input"`; the features of a layer, named as for
            [`Guide`][attnguide.Guide]: `"stage:1"`, or a module's name; or `"local"`, which the first call
            replaces by the deepest stage of a CNN whose positions see at most 1 % of the image
            ([`find_local`][attnguide.layers.find_local]), or by `"input"` if there is none.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain].
        process_group: As for [`Guide`][attnguide.Guide].

    Raises:
        InputError: If an argument has a wrong value.
        LayerError: If the layer is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        divergence: str = "js",
        swap: SwapOutside | None = None,
        seed: int = 0,
        layer: str = "input",
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
        self.model = model
        parallel = isinstance(model, nn.DataParallel)
        # Features cannot be exchanged there, as below.
        self.layer = images_name(unwrap(model)) if parallel and layer == LOCAL else _checked(model, layer)
        if parallel and not self._of_images():
            raise InputError(
                f"layer={layer!r}: DataParallel gives each replica a part of the batch, so features cannot "
                "be exchanged between all images. Use DistributedDataParallel, or layer='input'."
            )
        self.weight, self.divergence, self.seed = weight, divergence, seed
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
            LayerError: If the layer has no rows and columns.
            GuidanceError: If the logits have no graph, other processes do not call it, or the model cannot go
                on behind the layer with more images.
        """
        return self._through(lambda given, _: self.model(given), images, labels, mask)

    def _through(
        self, call: Callable[[Tensor, Tensor], Any], images: Tensor, labels: Tensor, mask: Any
    ) -> Intervened:
        """Intervene in a pass that somebody else makes, such as a trainer.

        Args:
            call: Runs the model once; gets the images, and the numbers of those that are exchanged, `(n,)`.
                Returns the model's output, of the images and behind them of the exchanged ones.
            images: As for `__call__`, like the rest.
            labels: Labels.
            mask: Masks.
        """
        if self.layer == LOCAL:
            self.layer = self._local(images)
        group = self._group()
        rank = 0 if group is None else dist.get_rank(group)
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        generator = generator_of(device, self.seed, self._steps, rank)
        with nullcontext() if self._steps else reading():  # values on an accelerator are checked once
            exchange = self.swap.draw(images, labels, mask, generator=generator)
        # The others need not run twice.
        rows = exchange.exchanged.nonzero()[:, 0]
        if self._of_images():
            swapped = exchange(images)
            output = call(torch.cat([images, swapped[rows]]), rows)
        else:
            swapped = images
            with self._exchanging(images, exchange, rows):
                output = call(images, rows)
        both = find_logits(output, self._logits)
        if not both.requires_grad:
            raise GuidanceError(
                "the logits have no graph: the model ran under torch.no_grad() or inference_mode(), or every "
                "parameter is frozen. Run an intervention with gradients enabled, and not in validation."
            )
        if len(both) != len(images) + len(rows):
            raise self._stuck(f"its logits are of {len(both)} images")
        first = both[: len(images)]
        second = first.index_copy(0, rows, both[len(images) :])
        independent = positives(labels, first).ndim == 2
        with full_precision_mode(both.device):
            apart = functional.divergence(first, second, self.divergence, independent=independent)
            counted = exchange.exchanged.to(apart)
            number = counted.sum()
            # The wrapper divides the sum of the gradients by the number of processes.
            share = 1 if group is None else dist.get_world_size(group)
            whole = number if group is None else joint_sum(number, group)
            loss = self.weight * share * (apart * counted).sum() / whole.clamp(min=1)
        self._steps += 1
        batch = Swapped(swapped, exchange.masks, exchange.partner, exchange.exchanged)
        return Intervened(loss, first, second, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return what training has changed, for a checkpoint: the number of steps, and the layer."""
        return {"step": self._steps, "layer": self.layer}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where an intervention with the same settings was when its `state_dict()` was taken.

        Raises:
            InputError: If the state is not that of an intervention.
            LayerError: If the model has no such layer.
        """
        others = {name: value for name, value in dict(state_dict).items() if name != "layer"}
        steps, layer = states.restore(others, (), nn.Module()), state_dict.get("layer")
        if not isinstance(layer, str):
            raise InputError(f"layer of the state is {layer!r}; it must be a name.")
        self.layer = _checked(self.model, layer)
        self._steps = steps

    @classmethod
    def from_recipe(
        cls, model: nn.Module, recipe: str | Path = "right-for-real", **overrides: Any
    ) -> Intervention:
        """Build an intervention from a recipe.

        Args:
            model: Any classifier.
            recipe: A registered name such as `"right-for-real"`, or the path of a TOML file that has a table
                `[intervention]`.
            **overrides: Arguments of [`Intervention`][attnguide.Intervention]; they replace the recipe's.

        Raises:
            UnknownNameError: If the recipe is unknown.
            InputError: If the file cannot be read, an argument is unknown, or the recipe is a guide.
        """
        loaded = load_recipe(recipe)
        if loaded.intervention is None:
            raise InputError(
                f"the recipe {loaded.name!r} compares maps with priors: use attnguide.Guide.from_recipe."
            )
        known = [name for name in inspect.signature(cls).parameters if name != "model"]
        for name in overrides:
            if name not in known:
                raise InputError(f"an intervention has no setting {name!r}.{nearest(name, known)}")
        return cls(model, **{**arguments_of(loaded.intervention), **overrides})

    def _local(self, images: Tensor) -> str:
        # Weights in training change, and with them what a position sees: the choice is made once.
        found = None
        if not isinstance(self.model, nn.DataParallel):
            call = None if self._logits is None else Call((images,), {}, images, self._logits)
            found = find_local(unwrap(self.model), images.detach(), call=call)
        return images_name(unwrap(self.model)) if found is None else found.name

    def _of_images(self) -> bool:
        return self.layer in (INPUT, images_name(unwrap(self.model)))

    @contextmanager
    def _exchanging(self, images: Tensor, exchange: Exchange, rows: Tensor) -> Iterator[None]:
        """Let a pass go on behind the layer with the features of the exchanged images after all others.

        Raises:
            GuidanceError: If the pass fails there.
        """
        model = unwrap(self.model)
        (layer,) = find_layers(model, images[:2].detach(), self.layer, call=None)[:1]
        tap, batch = Tap.parse(layer.name), len(images)
        done = False

        def more(values: Any) -> Any:
            nonlocal done
            feature = select(values, tap.path)
            if done or feature is None:
                return values
            done = True
            layout = layer.layout
            for path, tensor in list(tensors_in(values)):
                if tensor is not feature and tensor.ndim and len(tensor) == batch:
                    values = replace(values, path, torch.cat([tensor, tensor[rows]]))
            swapped = layout.replaced(feature, exchange(layout.spatial(feature)))
            return replace(values, tap.path, torch.cat([feature, swapped[rows]]))

        module, handles = model.get_submodule(tap.module), Handles()
        if tap.given:
            handles.keep(module.register_forward_pre_hook(in_this_thread(lambda _, args: more(args))))
        else:
            handles.keep(module.register_forward_hook(in_this_thread(lambda _, args, output: more(output))))
        try:
            yield
        except RuntimeError as error:
            if done and not isinstance(error, AttnGuideError):
                raise self._stuck(str(error)) from error
            raise
        finally:
            handles.remove()

    def _stuck(self, reason: str) -> GuidanceError:
        return GuidanceError(
            f"behind layer {self.layer!r} the model cannot go on with more images than it was given: "
            f"{reason:.200}. Choose a layer that all of the model passes through, such as layer='stage:1', "
            "or layer='input'."
        )

    def _group(self) -> ProcessGroup | None:
        """The processes whose gradients are averaged; None for this one alone."""
        if self._process_group is not None:
            return self._process_group
        if isinstance(self.model, DistributedDataParallel):
            return self.model.process_group
        return group_of(shards_of(modules_of(self.model)))

    def __repr__(self) -> str:
        at = "" if self._of_images() else f" at {self.layer}"
        return f"Intervention({type(self.model).__name__}: {self.divergence} × {self.weight:g}{at})"
