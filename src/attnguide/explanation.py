"""Explains: where does the model look?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from attnguide import functional, visual
from attnguide.errors import InputError
from attnguide.functional import full_precision
from attnguide.hooks import Recorder, aside, unwrap
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec, find_layers
from attnguide.modes import evaluating
from attnguide.pairs import Evidence, Pairs, Targets, resolve
from attnguide.registry import registry
from attnguide.terms import check_reach
from attnguide.trace import Trace
from attnguide.tracing import maps_of, trace_of

__all__ = ["Explanation", "explain"]

#: So many classes of a sample are attributed at once; bounds the memory when there are a thousand.
_CHUNK = 16


@dataclass(frozen=True)
class Explanation:
    """Where a model looks, for B images and up to T classes each.

    Attributes:
        maps: `(B, T, H, W)`, raw values as the source gives them, detached.
        classes: Class of each map, `(B, T)`, int64; −1 where an image has fewer than T.
        logits: What the model answered, `(B, K)`.
        images: What it was given, `(B, C, H0, W0)`.
        layer: The layer that was looked at; several names with a + between them.
        source: Name of the attribution source.
        by_layer: With several layers, the maps of each, as `maps`, before they were joined.
    """

    maps: Tensor
    classes: Tensor
    logits: Tensor
    images: Tensor
    layer: str
    source: str
    by_layer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> Tensor:
        """Logit of each map's class, `(B, T)`; NaN where there is none."""
        chosen = self.logits.float().gather(1, self.classes.clamp_min(0))
        return torch.where(self.classes >= 0, chosen, torch.nan)

    def scaled(self) -> Tensor:
        """Maps scaled to [0, 1] each by its minimum and maximum, `(B, T, H, W)`; a flat map becomes zeros."""
        return functional.min_max(self.maps)

    def overlay(self, images: Tensor | None = None, *, alpha: float = 0.5) -> Tensor:
        """Lay the scaled maps over the images in colour.

        Args:
            images: What to draw on, `(B, C, H0, W0)` in [0, 1]; by default the images that were explained,
                brought to [0, 1] each by its minimum and maximum, because the model's normalisation is not
                known here.
            alpha: Opacity of the maps, 0 to 1; 0 gives the images as they are.

        Returns:
            uint8 pictures `(B, T, 3, H0, W0)`, on the CPU.
        """
        return visual.overlay(
            visual.displayable(self.images) if images is None else images, self.scaled(), alpha
        )

    def save(
        self, folder: str | Path, names: Sequence[str] | None = None, *, format: str = "png"
    ) -> list[Path]:
        """Save one file for each map, `NAME_CLASS.png`: overlays, or raw values as `npy` or `npz`.

        Args:
            folder: Made if missing.
            names: A stem for each image; `image0`, `image1` … by default.
            format: `"png"`, `"npy"` or `"npz"` (the latter: `map`, `cls`, `score`).

        Returns:
            The files, written atomically.

        Raises:
            InputError: If the format is unknown, the names do not fit, or the folder cannot be written.
        """
        return visual.save_explanation(self, Path(folder), names, format)


def explain(
    model: nn.Module,
    images: Tensor,
    source: str | AttributionSource = "grad_cam",
    targets: Targets = "predicted",
    layer: LayerSpec = "auto",
    size: tuple[int, int] | Literal["input"] | None = "input",
    *,
    labels: Tensor | None = None,
    evidence: Evidence = "logit",
    fuse: str = "mean",
    verify: bool = True,
) -> Explanation:
    """Explain the answers of a classifier, without leaving a trace in it.

    The model runs once, in evaluation mode. Nothing before the target layer records a graph; for a source
    that needs no gradient nothing does at all.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, as the model expects them, on its device.
        source: An attribution source, by name or as an object.
        targets: Which classes; see [`pairs.resolve`][attnguide.pairs.resolve].
        layer: Where to look: `"auto"`, the deepest with rows and columns, `"stage:-2"`, a module's name, a
            pattern, or several; see [`find_layers`][attnguide.layers.find_layers].
        size: `"input"`: maps as large as the images; `(H, W)`; or None: the layer's own resolution.
        labels: Needed for `targets="labels"`.
        evidence: `"logit"`, or `"decision"`: for a negative logit the evidence is the negated logit.
        fuse: How the maps of several layers are joined: `"mean"`, `"max"` or `"product"`, after each is
            scaled to a maximum of 1.
        verify: Measure how the layer's output is arranged, once for a model and a size of images.

    Returns:
        The explanation.

    Raises:
        UnknownNameError: If the source is unknown.
        LayerError: If no layer will do.
        InputError: If the images or targets are wrong.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"images must be a tensor (B, C, H, W) with at least one image, got {got}. Add a batch axis: "
            "images[None]."
        )
    if not _is_size(size):
        raise InputError(f"size={size!r} must be 'input', None, or (height, width), both at least 1.")
    made: AttributionSource = registry().create("source", source, AttributionSource)
    with ExitStack() as stack:
        # A caller in inference mode would otherwise forbid the graph that starts at the layer.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Nor may autocast keep the weights that it casts here without a graph: a training step would find
        # them.
        device = images.device.type
        stack.enter_context(
            torch.autocast(
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
                cache_enabled=False,
            )
        )
        model = unwrap(model)  # no communication between processes: any of them may explain alone
        stack.enter_context(aside(model))
        stack.enter_context(evaluating(model))
        images = images.clone() if images.is_inference() else images.detach()
        layers = find_layers(model, images, layer, verify=verify)
        if made.needs_gradient:
            for one in layers:
                check_reach(one)
        recorder = Recorder(model, cut=made.needs_gradient)
        stack.callback(recorder.remove)
        recorder.attach(
            [one.name for one in layers], [one.pooled for one in layers if one.pooled and made.needs_gradient]
        )
        model(images)
        trace = trace_of(recorder.shards, layers, differentiable=False)
        pairs = resolve(targets, trace.logits, labels, evidence).compact()
        with torch.no_grad(), torch.autocast(trace.logits.device.type, enabled=False):
            target = trace.image_size if size == "input" else size
            by_layer = {one.name: _maps(made, trace.at(one.name), pairs, target) for one in layers}
            maps = _joined(list(by_layer.values()), fuse)
            classes = torch.full((len(images), pairs.slots), -1, device=maps.device)
            classes[pairs.sample, pairs.slot] = pairs.cls
        label = source if isinstance(source, str) else repr(source)
        return Explanation(
            maps,
            classes,
            trace.logits.detach(),
            images,
            " + ".join(by_layer),
            label,
            by_layer if len(by_layer) > 1 else {},
        )


def _maps(source: AttributionSource, trace: Trace, pairs: Pairs, target: tuple[int, int] | None) -> Tensor:
    """Compute the maps of one layer, `(B, T, H, W)`, resized unless the target is None."""
    shape = (len(trace.logits), pairs.slots, *source.size(trace))
    dense = len(pairs) == shape[0] * shape[1]
    maps = None
    for first, chunk in _chunks(pairs):
        found = maps_of(source, trace, chunk)
        if dense and len(chunk) == len(pairs):
            maps = found.view(shape)  # samples and slots are in order already
            continue
        if maps is None:
            maps = found.new_zeros(shape)
        maps[chunk.sample, chunk.slot + first] = found
    if maps is None:
        maps = full_precision(trace.logits).new_zeros(shape)
    if target is None or not maps.numel():
        return maps if target is None else maps.new_zeros(*shape[:2], *target)
    return functional.resize(maps.flatten(0, 1), target).view(*shape[:2], *target)


def _joined(maps: list[Tensor], fuse: str) -> Tensor:
    joined = functional.fuse([one.flatten(0, 1) for one in maps], fuse)
    return joined.view(*maps[0].shape[:2], *joined.shape[-2:])


def _is_size(size: object) -> bool:
    if isinstance(size, (tuple, list, torch.Size)):
        return len(size) == 2 and all(isinstance(side, int) and side >= 1 for side in size)
    return size is None or size == "input"


def _chunks(pairs: Pairs) -> Iterator[tuple[int, Pairs]]:
    """Split pairs so that no sample has more than a bounded number; with the first slot of each chunk."""
    if pairs.slots <= _CHUNK:
        if len(pairs):
            yield 0, pairs
        return
    for first in range(0, pairs.slots, _CHUNK):
        inside = (pairs.slot >= first) & (pairs.slot < first + _CHUNK)
        yield first, pairs.select(inside.nonzero()[:, 0])
