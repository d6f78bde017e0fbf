"""Explains: where does the model look?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attnguide import functional, visual
from attnguide.capture.calls import Call
from attnguide.capture.logits import LogitsSpec, check_spec
from attnguide.capture.model_state import evaluating, uncached_autocast, unwrap
from attnguide.capture.recorder import Plan, Recorder, adapters_of, aside
from attnguide.capture.suitable import check_images
from attnguide.data.files import atomic_write
from attnguide.data.images import save_picture
from attnguide.errors import InputError, nearest
from attnguide.functional import full_precision, full_precision_mode
from attnguide.interfaces import AttributionSource, maps_of
from attnguide.layers import LayerSpec, find_attention, find_layers, out_of_reach
from attnguide.pairs import Evidence, Pairs, Targets, resolve
from attnguide.parts.registry import registry
from attnguide.trace import Trace, trace_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Explanation", "explain"]

#: So many classes of a sample are attributed at once; bounds the memory when there are a thousand.
_CHUNK = 64
_NOT_FINITE = "the logits or the map have NaN or infinite values; check the model's weights"
#: Largest side of a map, in pixels.
_LONGEST = 65_535


@dataclass(frozen=True)
class Explanation:
    """Where a model looks, for B images and up to T classes each.

    Attributes:
        raw: Maps of each layer at its own resolution, `(B, T, h, w)`, values as the
            source gives them, detached.
        size: Size of `maps`, `(H, W)`; None for that of the layer (of several, the largest).
        classes: Class of each map, `(B, T)`, int64; −1 where an image has fewer than T.
        logits: What the model answered, `(B, K)`.
        images: What it was given, `(B, C, H0, W0)`.
        source: Name of the attribution source.
        combine: How the maps of several layers are joined.
        skipped: Why images have no map, by their number, with `errors="skip"`. Their classes are −1, their
            logits NaN and their maps zeros.
    """

    raw: dict[str, Tensor]
    size: tuple[int, int] | None
    classes: Tensor
    logits: Tensor
    images: Tensor
    source: str
    combine: str = "mean"
    skipped: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def maps(self) -> Tensor:
        """The maps `(B, T, H, W)`, computed from the raw ones, on their device, when first asked for."""
        shape = next(iter(self.raw.values())).shape[:2]
        joined = functional.combine([maps.flatten(0, 1) for maps in self.raw.values()], self.combine)
        return self._resized(joined.view(*shape, *joined.shape[-2:]))

    @property
    def layer(self) -> str:
        """The layer that was looked at; several names with a + between them."""
        return " + ".join(self.raw)

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """The maps of each layer, resized, before they are joined."""
        return {name: self._resized(maps) for name, maps in self.raw.items()}

    def _resized(self, maps: Tensor) -> Tensor:
        if self.size is None or tuple(maps.shape[-2:]) == tuple(self.size):
            return maps
        if not maps.numel():
            return maps.new_zeros(*maps.shape[:2], *self.size)
        with torch.inference_mode(False), torch.no_grad():
            return functional.resize(maps.flatten(0, 1), self.size).view(*maps.shape[:2], *self.size)

    @property
    def scores(self) -> Tensor:
        """Logit of each map's class, `(B, T)`; NaN where there is none."""
        chosen = self.logits.float().gather(1, self.classes.clamp_min(0))
        return torch.where(self.classes >= 0, chosen, torch.nan)

    def scaled(self) -> Tensor:
        """Maps scaled to [0, 1] each by its minimum and maximum, `(B, T, H, W)`; a flat map becomes zeros."""
        return functional.min_max(self.maps)

    def to_numpy(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return plain arrays, which keep neither the images nor a device's memory.

        Returns:
            `maps` `(B, T, H, W)`, `classes` and `scores` `(B, T)`, and `logits` `(B, K)`.
        """
        values = {"maps": self.maps, "classes": self.classes, "scores": self.scores, "logits": self.logits}
        found = {
            name: value.float() if value.is_floating_point() else value for name, value in values.items()
        }
        return {name: value.cpu().numpy() for name, value in found.items()}

    def to_arrow(
        self,
        keys: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        *,
        multi_label: bool = False,
    ) -> pa.Table:
        """Return a table of Arrow with a row for each map, as [`read_maps`][attnguide.read_maps] gives it.

        ```python
        found = ag.explain(model, images, size=None)
        table = found.to_arrow(["a.jpg", "b.jpg"])
        ```

        Args:
            keys: What each image is called; `image0`, `image1` … by default.
            names: Name of each class; its number by default.
            multi_label: Whether each class is predicted independently: scores are a sigmoid, not a softmax.

        Raises:
            InputError: If there are not as many keys as images, or pyarrow is missing.
        """
        from attnguide.data.maps import map_table

        keys = [f"image{index}" for index in range(len(self.classes))] if keys is None else list(keys)
        if len(keys) != len(self.classes):
            raise InputError(f"{len(self.classes)} images need as many keys, got {len(keys)}.")
        logits = self.logits.float()
        single = multi_label or logits.shape[1] == 1
        probabilities = logits.sigmoid() if single else logits.softmax(dim=1)
        arrays = self.to_numpy()
        scores = probabilities.gather(1, self.classes.clamp_min(0)).cpu().numpy()
        return map_table(
            keys,
            arrays["maps"],
            arrays["classes"],
            arrays["scores"],
            scores,
            names=names,
            layer=self.layer,
            errors=self.skipped,
        )

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
        if not isinstance(folder, (str, Path)) or not str(folder):
            raise InputError(f"folder={folder!r:.60} must be the name of a folder; '.' is the current one.")
        return _save(self, Path(folder), names, format)


def _save(explanation: Explanation, folder: Path, names: Sequence[str] | None, format: str) -> list[Path]:
    """Write one file for each map."""
    if format not in ("png", "npy", "npz"):
        raise InputError(f"format={format!r} is unknown.{nearest(format, ('png', 'npy', 'npz'))}")
    if names is None:
        names = [f"image{index}" for index in range(len(explanation.maps))]
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"names={names!r:.60} must be a list with a name for each image.")
    names = list(names)
    if len(names) != len(explanation.maps) or len(set(map(str, names))) != len(names):
        raise InputError(f"{len(explanation.maps)} images need as many different names, got {names}.")
    for name in names:
        # A name is a stem: a path would lead out of the folder.
        if not isinstance(name, str) or not name or set(name) & {"/", "\\", "\0"}:
            raise InputError(f"names has {name!r}, which must be text without a slash: the stem of a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}.") from error
    pictures = explanation.overlay() if format == "png" else None
    maps, scores = explanation.maps.float().cpu().numpy(), explanation.scores.cpu().numpy()
    written = []
    for row, name in enumerate(names):
        for column, cls in enumerate(explanation.classes[row].tolist()):
            if cls < 0:
                continue
            path = folder / f"{name}_{cls}.{format}"
            with atomic_write(path) as temporary:
                if pictures is not None:
                    save_picture(visual.to_pil(pictures[row, column]), temporary)
                elif format == "npy":
                    np.save(temporary, maps[row, column])
                else:
                    np.savez_compressed(temporary, map=maps[row, column], cls=cls, score=scores[row, column])
            written.append(path)
    return written


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
    combine: str = "mean",
    measure: bool = True,
    logits: LogitsSpec = None,
    errors: Literal["raise", "skip"] = "raise",
) -> Explanation:
    """Explain the answers of a classifier, without leaving a trace in it.

    The model runs once, in evaluation mode. Nothing before the target layer records a graph; for a source
    that needs no gradient nothing does at all.

    Several threads may explain the same model: they take turns. A forward of another thread goes on
    meanwhile, in evaluation mode.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, as the model expects them, on its device.
        source: An attribution source, by name or as an object.
        targets: Which classes; see [`pairs.resolve`][attnguide.pairs.resolve].
        layer: Where to look: `"auto"`, the deepest with rows and columns, `"stage:-2"`, a module's name, a
            pattern, a `Layer` that was found before, or several; see
            [`find_layers`][attnguide.layers.find_layers].
        size: `"input"`: maps as large as the images; `(H, W)`; or None: the layer's own resolution.
        labels: Needed for `targets="labels"`.
        evidence: `"logit"`, or `"decision"`: for a negative logit the evidence is the negated logit.
        combine: How the maps of several layers are joined: `"mean"`, `"max"` or `"product"`, after each is
            scaled to a maximum of 1.
        measure: Measure how the layer's output is arranged, once for a model and a size of images.
        logits: Which part of the model's output is the logits: a name such as `"scores"` or
            `"heads.species"`, an index, or a function of the output. By default the output itself, if it is a
            tensor; else its `logits`; else the only floating-point tensor with one or two axes in it.
        errors: `"skip"`: an image with NaN or infinite values, and one for which the model gives such, has no
            map, and the others do; see `Explanation.skipped`. `"raise"`: an error for such an image.

    Returns:
        The explanation.

    Raises:
        UnknownNameError: If the source is unknown.
        LayerError: If no layer will do.
        InputError: If the images or targets are wrong, or an image has NaN or infinite values.
        GuidanceError: If several tensors of the output could be the logits, or none.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        check_images(images)
    if images.is_meta:
        raise InputError("images are on the device meta, which holds no values. Make them on the CPU.")
    if errors not in ("raise", "skip"):
        raise InputError(f"errors={errors!r} is unknown: choose 'raise' or 'skip'.")
    given = images
    skipped: dict[int, str] = {}
    if not bool((finite := images.isfinite().flatten(1).all(dim=1)).all()):
        bad = (~finite).nonzero()[:, 0].tolist()
        if errors == "raise":
            raise InputError(
                f"images[{bad[0]}] has NaN or infinite values. Check how it was read and normalised, or "
                "leave it out: errors='skip'."
            )
        skipped = dict.fromkeys(bad, "the image has NaN or infinite values")
        images = images.masked_fill(~finite[:, None, None, None], 0)
    if combine not in functional.COMBINATIONS:
        raise InputError(
            f"combine={combine!r} is unknown: choose one of {', '.join(functional.COMBINATIONS)}."
        )
    sides = size if isinstance(size, (tuple, list)) else ()
    if size not in (None, "input") and not (
        len(sides) == 2 and all(isinstance(side, int) and 1 <= side <= _LONGEST for side in sides)
    ):
        raise InputError(
            f"size={size!r} must be 'input', None, or (height, width), both at least 1, at most {_LONGEST}."
        )
    if logits is not None:
        check_spec(logits)
    attribution: AttributionSource = registry().create("source", source, AttributionSource)
    with ExitStack() as stack:
        if not images.is_floating_point():
            stack.enter_context(_naming_the_type(images))
        # A caller in inference mode would otherwise forbid the graph that starts at the layer.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Nor may autocast keep the weights that it casts here without a graph: a training step would find
        # them.
        stack.enter_context(uncached_autocast(images.device))
        model = unwrap(model)  # no communication between processes: any of them may explain alone
        stack.enter_context(evaluating(model))  # first, since other threads wait here
        stack.enter_context(aside(model))
        images = images.clone() if images.is_inference() else images.detach()
        call = None if logits is None else Call((images,), {}, images, logits)
        layers = find_layers(model, images, attribution.layers(layer), measure=measure, call=call)
        adapters = adapters_of(model)
        if adapters:
            layers = [found.plain() for found in layers]
        watched: list[str] = []
        class_token: dict[str, tuple[int, bool]] = {}
        attending = None
        if attribution.needs_gradient:
            for found in layers:
                if found.spread == 0:
                    raise out_of_reach(found)
                watched += found.watched
        if attribution.reads_attention:
            attending = find_attention(model, images, max(found.tokens for found in layers), call=call)
        elif attribution.needs_gradient:
            for found in layers:
                class_token.update(found.class_token)
        recorder = Recorder(model, cut=attribution.needs_gradient, logits=logits)
        stack.callback(recorder.remove)
        attention = () if attending is None else attending.modules
        recorder.record(Plan([found.name for found in layers], watched, attention, class_token))
        model(images)
        trace = trace_of(
            [*recorder.recordings.values()],
            layers,
            differentiable=False,
            adapters=adapters,
            attending=attending,
            model=model,
            output=logits,
        )
        pairs = resolve(targets, trace.logits, labels, evidence).compact()
        if errors == "skip":
            finite = trace.logits.isfinite().all(dim=1)
            for index in (~finite).nonzero()[:, 0].tolist():
                skipped.setdefault(index, _NOT_FINITE)
            if skipped:
                kept = torch.ones_like(finite)
                kept[list(skipped)] = False
                pairs = pairs.select(kept[pairs.sample].nonzero()[:, 0]).compact()
        with torch.no_grad(), full_precision_mode(trace.logits.device):
            raw = {found.name: _maps(attribution, trace.at(found.name), pairs) for found in layers}
            classes = torch.full((len(images), pairs.slots), -1, device=trace.logits.device)
            classes[pairs.sample, pairs.slot] = pairs.cls
        answers = trace.logits.detach()
        if errors == "skip":
            raw = _without_maps(raw, classes, skipped)
            answers = answers.clone() if skipped else answers
            answers[list(skipped)] = torch.nan
            images = given
        return Explanation(
            raw,
            (images.shape[-2], images.shape[-1]) if size == "input" else size,
            classes,
            answers,
            images,
            source if isinstance(source, str) else repr(source),
            combine,
            skipped,
        )


def _without_maps(raw: dict[str, Tensor], classes: Tensor, skipped: dict[int, str]) -> dict[str, Tensor]:
    """Add images whose maps are not finite to the skipped ones, and empty these."""
    for maps in raw.values():
        for index in (~maps.isfinite().flatten(1).all(dim=1)).nonzero()[:, 0].tolist():
            skipped.setdefault(index, _NOT_FINITE)
    if not skipped:
        return raw
    bad = list(skipped)
    classes[bad] = -1
    emptied = {name: maps.clone() for name, maps in raw.items()}
    for maps in emptied.values():
        maps[bad] = 0
    return emptied


@contextmanager
def _naming_the_type(images: Tensor) -> Iterator[None]:
    """Turn an error of the model at images of whole numbers into one that names their type."""
    try:
        yield
    except RuntimeError as error:
        if images.is_floating_point():
            raise
        raise InputError(
            f"the model does not take images of {images.dtype} ({error}). Convert them: images.float() / "
            "255, normalised as in training."
        ) from error


def _maps(source: AttributionSource, trace: Trace, pairs: Pairs) -> Tensor:
    """Compute the maps of one layer, `(B, T, h, w)`; zeros where an image has fewer classes than T."""
    shape = (len(trace.logits), pairs.slots, *source.size(trace))
    maps = None
    # A model may have thousands of classes: no sample has more than a bounded number of maps at once.
    for first in range(0, pairs.slots, _CHUNK):
        chunk = pairs
        if pairs.slots > _CHUNK:
            inside = (pairs.slot >= first) & (pairs.slot < first + _CHUNK)
            chunk = pairs.select(inside.nonzero()[:, 0])
        found = maps_of(source, trace, chunk)
        if len(found) == shape[0] * shape[1]:  # all of them, in order already
            return found.view(shape)
        if maps is None:
            maps = found.new_zeros(shape)
        maps[chunk.sample, chunk.slot + first] = found
    return full_precision(trace.logits).new_zeros(shape) if maps is None else maps
