"""Explains: where does the model look?"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image
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
from attnguide.models.loaded_model import LoadedModel
from attnguide.models.preprocessing import Pictures, preprocessing_of
from attnguide.pairs import Evidence, Pairs, Targets, resolve
from attnguide.parts.registry import registry
from attnguide.trace import Trace, trace_of

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

__all__ = ["Explanation", "explain"]

#: So many classes of a sample are attributed at once; bounds the memory when there are a thousand.
_CHUNK = 64
_NOT_FINITE = "the logits or the map have NaN or infinite values; check the model's weights"
#: Largest side of a map, in pixels.
_LONGEST = 65_535
#: From so many seconds on, an attribution announces itself.
_LONG = 20
#: Largest numbers of images and of maps of each on a page.
_IMAGES, _MAPS = 12, 6


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
        normalization: Mean and standard deviation of each channel, which were subtracted from the images and
            divided by; None if they are not known.
        class_names: Names of the K classes; empty if they are not known.
        names: Name of each image, from its file; empty if tensors were given.

    In a notebook an explanation shows itself: each image with its maps, as [`picture`][attnguide.Explanation]
    draws them.
    """

    raw: dict[str, Tensor]
    size: tuple[int, int] | None
    classes: Tensor
    logits: Tensor
    images: Tensor
    source: str
    combine: str = "mean"
    skipped: Mapping[int, str] = field(default_factory=dict)
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

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

    @property
    def signed(self) -> bool:
        """Whether there is evidence against a class: values below 0."""
        return visual.has_signs(self.maps)

    @property
    def displayed(self) -> Tensor:
        """The images as RGB in [0, 1], `(B, 3, H0, W0)`.

        The model's normalisation is undone. Where that is not known, each image is scaled by its own minimum
        and maximum.
        """
        if self.normalization is None or len(self.normalization[0]) != self.images.shape[1]:
            return visual.displayable(self.images)
        images = full_precision(self.images.detach())
        mean, std = (images.new_tensor(values)[:, None, None] for values in self.normalization)
        images = (images * std + mean).clamp(0, 1)
        return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)

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
            keys: What each image is called; by default the explanation's `names`, else `image0`, `image1` …
            names: Name of each class; by default the explanation's `class_names`, else its number.
            multi_label: Whether each class is predicted independently: scores are a sigmoid, not a softmax.

        Raises:
            InputError: If there are not as many keys as images, or pyarrow is missing.
        """
        from attnguide.data.maps import map_table

        if keys is None:
            keys = self.names or [f"image{index}" for index in range(len(self.classes))]
        if len(keys) != len(self.classes):
            raise InputError(f"{len(self.classes)} images need as many keys, got {len(keys)}.")
        logits = self.logits.float()
        if names is None and len(self.class_names) == logits.shape[1]:
            names = self.class_names
        single = multi_label or logits.shape[1] == 1
        probabilities = logits.sigmoid() if single else logits.softmax(dim=1)
        arrays = self.to_numpy()
        scores = probabilities.gather(1, self.classes.clamp_min(0)).cpu().numpy()
        return map_table(
            list(keys),
            arrays["maps"],
            arrays["classes"],
            arrays["scores"],
            scores,
            names=names,
            layer=self.layer,
            errors=self.skipped,
        )

    def overlay(
        self, images: Tensor | None = None, *, alpha: float = 0.5, percentile: float = visual.PERCENTILE
    ) -> Tensor:
        """Lay the maps over the images in colour; signed ones in red for the class and blue against it.

        Args:
            images: What to draw on, `(B, 3, H0, W0)` in [0, 1]; by default
                [`displayed`][attnguide.Explanation].
            alpha: Opacity of the maps, 0 to 1; 0 gives the images as they are.
            percentile: Percentile of a map's values at which the colours end.

        Returns:
            uint8 pictures `(B, T, 3, H0, W0)`, on the CPU; see [`visual.overlay`][attnguide.visual.overlay].
        """
        drawn_on = self.displayed if images is None else images
        return self._laid_over(drawn_on, self.maps, alpha, percentile)

    def _laid_over(
        self, images: Tensor, maps: Tensor, alpha: float, percentile: float = visual.PERCENTILE
    ) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            return visual.overlay(images, maps)  # which reports what is wrong
        size, signed = (images.shape[-2], images.shape[-1]), self.signed
        drawn = visual.scaled(maps, size=size, signed=signed, percentile=percentile)
        return visual.overlay(images, drawn, alpha, signed=signed)

    def class_name(self, cls: int) -> str:
        """Name of a class; "class 3" if the names are not known."""
        return self.class_names[cls] if cls < len(self.class_names) else f"class {cls}"

    def picture(self, *, alpha: float = 0.5, cell: int = 224) -> Image.Image:
        """Draw one page: each image with its maps, their classes and logits, and a colour bar.

        At most 12 images are shown, and of each the 6 maps of the highest logits.

        Args:
            alpha: Opacity of the maps, 0 to 1.
            cell: Side of an image in pixels.
        """
        shown, overlays, plain = self._shown(alpha)
        group = 1 + max((len(columns) for columns in shown), default=0)
        pictures: list[Image.Image | None] = []
        captions: list[str] = []
        for row, columns in enumerate(shown):
            pictures += [visual.to_pil(plain[row]), *(visual.to_pil(overlays[row, c]) for c in columns)]
            captions += [self._name(row), *(self._caption(row, column) for column in columns)]
            pictures += [None] * (group - 1 - len(columns))
            captions += [""] * (group - 1 - len(columns))
        page = visual.contact_sheet(pictures, captions, columns=max(1, 5 // group), cell=cell, group=group)
        return visual.with_legend(page, self._legend(), signed=self.signed)

    def figure(self, *, alpha: float = 0.5) -> Figure:
        """Draw what [`picture`][attnguide.Explanation] shows as a figure of matplotlib, with a colour bar.

        Raises:
            InputError: If matplotlib is not installed.
        """
        try:
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import ListedColormap, Normalize
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("figures need matplotlib: pip install 'attnguide[figures]'.") from error
        shown, overlays, plain = self._shown(alpha)
        width = 1 + max((len(columns) for columns in shown), default=0)

        class Shown(Figure):
            """A figure that a notebook shows without pyplot."""

            def _repr_png_(self) -> bytes:
                buffer = io.BytesIO()
                self.savefig(buffer, format="png")
                return buffer.getvalue()

        figure = Shown(figsize=(2.4 * width + 1, 2.7 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), width, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, columns in enumerate(shown):
            pictures = [visual.to_pil(plain[row]), *(visual.to_pil(overlays[row, c]) for c in columns)]
            captions = [self._name(row), *(self._caption(row, column) for column in columns)]
            for axis, drawn, caption in zip(axes[row], pictures, captions, strict=False):
                axis.imshow(drawn)
                axis.set_title(caption, fontsize="small")
        low = -1 if self.signed else 0
        colors = visual.colorize(torch.linspace(low, 1, 256)[None], signed=self.signed)[:, 0].T.tolist()
        mappable = ScalarMappable(Normalize(low, 1), ListedColormap(colors))
        bar = figure.colorbar(mappable, ax=axes, shrink=0.6, ticks=[low, 0, 1])
        bar.ax.set_yticklabels(["against", "0", "for"] if self.signed else ["low", "", "high"])
        figure.supxlabel(self._legend(), fontsize="small")
        return figure

    def show(self, *, alpha: float = 0.5) -> None:
        """Show the page: below the cell of a notebook, elsewhere in the system's viewer of pictures."""
        visual.show(self.picture(alpha=alpha))

    def _repr_png_(self) -> bytes:
        return visual.to_png(self.picture())

    def __repr__(self) -> str:
        batch, count = self.classes.shape
        return f"Explanation({self.source} at {self.layer}: {batch} images, up to {count} maps each)"

    def _shown(self, alpha: float) -> tuple[list[list[int]], Tensor, Tensor]:
        """Columns of the maps of each image on the page, all overlays of these images, and the images."""
        count = min(_IMAGES, len(self.classes))
        scores = self.scores[:count].nan_to_num(-torch.inf)
        if scores.shape[1] <= _MAPS:  # in the order in which they were requested
            scores = torch.zeros_like(scores)
        shown = [
            [column for column in order if self.classes[row, column] >= 0][:_MAPS]
            for row, order in enumerate(scores.argsort(dim=1, descending=True, stable=True).tolist())
        ]
        plain = self.displayed[:count]
        return shown, self._laid_over(plain, self.maps[:count], alpha), plain

    def _name(self, row: int) -> str:
        return self.names[row] if row < len(self.names) else f"image {row}"

    def _caption(self, row: int, column: int) -> str:
        return f"{self.class_name(int(self.classes[row, column]))}  {float(self.scores[row, column]):.1f}"

    def _legend(self) -> str:
        left_out = len(self.classes) - _IMAGES
        more = f"; {left_out} more images" if left_out > 0 else ""
        scale = f"each map by itself, up to its {visual.PERCENTILE:g}th percentile"
        return f"{self.source} at {self.layer}: {scale}{more}"

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
    model: nn.Module | LoadedModel,
    images: Tensor | Pictures,
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
    transform: Any = None,
    smooth: int = 0,
) -> Explanation:
    """Explain the answers of a classifier, without leaving a trace in it.

    The model runs once, in evaluation mode. Nothing before the target layer records a graph; for a source
    that needs no gradient nothing does at all.

    Several threads may explain the same model: they take turns. A forward of another thread goes on
    meanwhile, in evaluation mode.

    Args:
        model: Any classifier, or a [`LoadedModel`][attnguide.models.LoadedModel].
        images: `(B, C, H, W)`, as the model expects them, on its device. Or image files, folders, patterns
            such as `"photos/*.jpg"`, PIL images, or several of these, where it is known how the model wants
            them; see [`preprocessing_of`][attnguide.models.preprocessing_of].
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
        transform: How files and PIL images become the model's input: a function, weights of torchvision, or
            an image processor of transformers. Not needed where the model says so itself.
        smooth: Number of copies of the images over whose raw maps the mean is taken; 0 for the images alone.
            Every second copy is mirrored, and Gaussian noise of a tenth of the image's range is added to all
            but the first (SmoothGrad, Smilkov et al. 2017). The classes are those of the images themselves.

    Returns:
        The explanation.

    Warns:
        UserWarning: If the source runs the model so often that it takes more than 20 seconds, by an estimate.

    Raises:
        UnknownNameError: If the source is unknown.
        LayerError: If no layer will do.
        InputError: If the images or targets are wrong, or an image has NaN or infinite values.
        GuidanceError: If several tensors of the output could be the logits, or none.
    """
    about: dict[str, Any] = {}
    if type(smooth) is not int or smooth < 0:
        raise InputError(f"smooth={smooth!r} must be a number of copies of the images, at least 0.")
    if smooth > 1 and evidence != "logit":
        raise InputError("smooth= needs evidence='logit': noise may change a decision, and so the sign.")
    if isinstance(images, (str, Path, Image.Image)) or _are_pictures(images):
        images, about = _read(model, images, transform)  # type: ignore[arg-type]
    elif transform is not None:
        raise InputError("transform= is for image files and PIL images; a tensor is taken as it is.")
    elif isinstance(model, LoadedModel):
        about = {"normalization": (model.mean, model.std), "class_names": model.classes}
    if isinstance(model, LoadedModel):
        model = model.model
    images = cast("Tensor", images)  # anything else is an error now
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        check_images(images)
    if images.is_meta:
        raise InputError("images are on the device meta, which holds no values. Make them on the CPU.")
    if errors not in ("raise", "skip"):
        raise InputError(f"errors={errors!r} is unknown: choose 'raise' or 'skip'.")
    given = images
    skipped: dict[int, str] = {}
    # Where a value is not finite, neither is the sum; looking at each takes several passes over the images.
    if not bool(images.detach().sum().isfinite()) and not bool(
        (finite := images.isfinite().flatten(1).all(dim=1)).all()
    ):
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
        start = time.perf_counter()
        model(images)
        seconds = time.perf_counter() - start
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
        _announce(attribution, trace, pairs, seconds)
        with torch.no_grad(), full_precision_mode(trace.logits.device):
            raw = {found.name: _maps(attribution, trace.at(found.name), pairs) for found in layers}
            classes = torch.full((len(images), pairs.slots), -1, device=trace.logits.device)
            classes[pairs.sample, pairs.slot] = pairs.cls
        explanation = Explanation(
            raw,
            (images.shape[-2], images.shape[-1]) if size == "input" else size,
            classes,
            trace.logits.detach(),
            images,
            source if isinstance(source, str) else repr(source),
            combine,
            **about,
        )
    # Nothing of the caller's mode here either.
    with torch.inference_mode(False), torch.no_grad():
        if smooth > 1 and len(pairs):
            explanation = _smoothed(
                explanation,
                smooth,
                lambda images, targets: explain(
                    model,
                    images,
                    attribution,
                    targets,
                    layer,
                    None,
                    combine=combine,
                    measure=measure,
                    logits=logits,
                ),
            )
        return _without_skipped(explanation, given, skipped) if errors == "skip" else explanation


def _smoothed(
    found: Explanation, copies: int, again: Callable[[Tensor, list[tuple[int, int]]], Explanation]
) -> Explanation:
    """Take the mean of an explanation's raw maps and of those of copies with noise, half of them mirrored."""
    images = found.images.float()
    spread = images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True)
    targets = [(row, cls) for row, listed in enumerate(found.classes.tolist()) for cls in listed if cls >= 0]
    generator = torch.Generator().manual_seed(0)
    total = dict(found.raw)
    for copy in range(1, copies):
        noise = torch.randn(images.shape, generator=generator).to(images)
        noisy = (images + 0.1 * spread * noise).to(found.images)
        mirrored = copy % 2 == 1
        raw = again(noisy.flip(-1) if mirrored else noisy, targets).raw
        # A layer that was found by "auto" is the same one for all copies.
        for name, maps in zip(total, raw.values(), strict=True):
            total[name] = total[name] + (maps.flip(-1) if mirrored else maps)
    mean = {name: maps / copies for name, maps in total.items()}
    return replace(found, raw=mean, source=f"{found.source}, smoothed over {copies}")


def _are_pictures(images: Any) -> bool:
    """Whether this is a list of paths and images; what else is in it is an error later."""
    return (
        isinstance(images, Sequence)
        and bool(images)
        and any(isinstance(item, (str, Path, Image.Image)) for item in images)
    )


def _read(
    model: nn.Module | LoadedModel, pictures: Pictures, transform: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Read images, and prepare them for the model; with what the explanation says about them."""
    preprocessing = preprocessing_of(model, transform)
    images, names = preprocessing.read(pictures)
    network = model.model if isinstance(model, LoadedModel) else model
    weight = next((w for w in network.parameters() if w.is_floating_point()), images)
    known = (preprocessing.mean, preprocessing.std) if preprocessing.mean else None
    about = {"normalization": known, "class_names": preprocessing.class_names, "names": names}
    return images.to(weight), about


def _announce(source: AttributionSource, trace: Trace, pairs: Pairs, seconds: float) -> None:
    """Warn of a source that will take long, by the time of one pass over the batch.

    On an accelerator that time is a lower bound, because nothing waits for its result.
    """
    passes = source.passes(trace)
    estimate = seconds / len(trace.images) * passes * len(pairs)
    if estimate > _LONG:
        took = f"{estimate:.0f} seconds" if estimate < 120 else f"{estimate / 60:.0f} minutes"
        warnings.warn(
            f"slow source: {source!r} runs the model {passes} times for each of {len(pairs)} maps, which "
            f"takes about {took}.",
            stacklevel=3,
        )


def _without_skipped(found: Explanation, given: Tensor, skipped: dict[int, str]) -> Explanation:
    """Add images whose maps are not finite to the skipped ones, and empty the maps of all of these."""
    for maps in found.raw.values():
        for index in (~maps.isfinite().flatten(1).all(dim=1)).nonzero()[:, 0].tolist():
            skipped.setdefault(index, _NOT_FINITE)
    if not skipped:
        return found
    bad = list(skipped)
    classes, logits = found.classes.clone(), found.logits.clone()
    classes[bad], logits[bad] = -1, torch.nan
    emptied = {name: maps.clone() for name, maps in found.raw.items()}
    for maps in emptied.values():
        maps[bad] = 0
    return replace(found, raw=emptied, classes=classes, logits=logits, images=given.detach(), skipped=skipped)


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
