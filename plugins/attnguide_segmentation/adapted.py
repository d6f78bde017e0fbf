"""Puts SSP, SSG and related adapters on a model, and loads them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from attnguide.adapters import AdapterSet, SavedAdapters, feature_sizes
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import unwrap
from attnguide.errors import InputError, UnknownNameError
from attnguide.interfaces import Adapter
from attnguide_segmentation._hosts import find_gate, first_convolution
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.gating import SSG, MaskChannels, Start
from attnguide_segmentation.pooling import SSP, PyramidPooling
from attnguide_segmentation.regions import REGIONS

__all__ = ["KINDS", "METHODS", "Average", "RegionAdapters", "attach", "load_adapters"]

#: Names of this plugin's adapters in files.
KINDS: tuple[str, ...] = (SSP.name, SSG.name, PyramidPooling.name, MaskChannels.name)

#: Methods that `attach` puts on a model.
METHODS: tuple[str, ...] = ("ssp", "ssg", "average", "pyramid", "mask_channels", "boxes")

Regions = RegionFinder | Callable[[Tensor], Tensor] | str | Path | None


class RegionAdapters(AdapterSet):
    """Adapters on a model, with the finder of the regions that they use.

    Made by [`attach`][attnguide_segmentation.attach] and
    [`load_adapters`][attnguide_segmentation.load_adapters].

    Attributes:
        finder: Source of the region masks; `finder.give(masks)` before a forward pass sets your own masks,
            and `finder.give(landmarks=points)` draws them around landmarks.
    """

    finder: RegionFinder


def attach(
    model: nn.Module,
    images: Tensor,
    *methods: str,
    layer: str = "auto",
    gate: str | None = None,
    start: Start = "identity",
    normalize: bool = False,
    classes: int | None = None,
    regions: Regions = None,
    measure: bool = True,
) -> RegionAdapters:
    """Put SSP, SSG, or the methods that they were compared with, on any model.

    ```python
    adapted = attach(model, images[:2], "ssp")
    optimizer = torch.optim.AdamW([*model.parameters(), *adapted.parameters()])
    logits = model(images)  # the adapter's
    adapted.save("ssp.safetensors")
    adapted.remove()
    ```

    Args:
        model: Any classifier.
        images: Some images, `(B, 3, H, W)`, as in training, to find layers and numbers of channels.
        *methods: One or several of `"ssp"`, which pools inside the regions; `"ssg"`, which gates by them;
            `"average"` pooling; `"pyramid"` (SPPNet*); `"mask_channels"` (the naive way); `"boxes"`: SSP
            with 16 boxes in place of the seven regions, which `regions` has to give.
        layer: Layer whose features are pooled.
        gate: Layer that SSG gates: a layer's name, or as in `"stage:1"`; by default the stage whose grid is
            nearest to an eighth of the image's.
        start: Initial state of SSG; see [`SSG`][attnguide_segmentation.gating.SSG].
        normalize: Whether SSP's regions compete on equal terms; see
            [`SSP`][attnguide_segmentation.pooling.SSP].
        classes: Number of classes K, if it differs from the model's.
        regions: Function that returns masks for images, or the file of a parser; by default
            `"face_parser"`, the embedded parser, for drawn faces. With `"landmarks"`, for photographs, give
            the landmarks before each forward pass: `adapted.finder.give(landmarks=points)`.
        measure: Measure the layout of the layer whose features are pooled.

    Returns:
        The adapters on the model, on its device; `ag.Guide(model, …, adapters=…)` guides a model with them.

    Raises:
        UnknownNameError: If a method, or the name of a finder of regions, is unknown.
        DataError: If the file of the parser cannot be read.
        InputError: If no method is named.
        LayerError: If the model lacks the layer, or the layer cannot be gated.
    """
    if not methods:
        raise InputError(f"nothing to attach: name one of {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if "boxes" in methods and {"ssg", "mask_channels"} & set(methods):
        raise InputError(
            "boxes are 16 regions, and ssg and mask_channels take seven: attach them to different models."
        )
    finder = _finder(regions, 16 if "boxes" in methods else 7)
    inner = unwrap(model)  # names of layers and their sizes are those of the model itself
    adapters: list[Adapter] = []
    with torch.inference_mode(False):  # else the weights could not be trained
        if "mask_channels" in methods:
            name, first = first_convolution(inner, images)
            padding = first.padding if isinstance(first.padding, str) else tuple(first.padding)
            sizes = (first.kernel_size, first.stride, padding, first.dilation)
            adapters.append(MaskChannels(first.out_channels, *sizes, after=name, regions=finder))
        if "ssg" in methods:
            place = find_gate(inner, images, gate)
            adapters.append(
                SSG(
                    place.channels,
                    after=place.after,
                    through=place.through,
                    instead_of=place.instead_of,
                    start=start,
                    regions=finder,
                )
            )
        pooling = [method for method in methods if method not in ("mask_channels", "ssg")]
        if len(pooling) > 1:
            raise InputError(f"{', '.join(pooling)} all replace the model's logits; name one of them.")
        if pooling:
            channels, outputs = feature_sizes(inner, images, layer)
            outputs = outputs if classes is None else classes
            if pooling[0] in ("average", "pyramid"):
                levels = (1,) if pooling[0] == "average" else (1, 2)
                adapters.append(PyramidPooling(channels, outputs, levels=levels, layer=layer))
            else:
                names = REGIONS if pooling[0] == "ssp" else [f"box{number}" for number in range(finder.count)]
                adapters.append(
                    SSP(channels, outputs, regions=finder, layer=layer, names=names, normalize=normalize)
                )
    return _put_on(model, adapters, finder, images, measure)


def load_adapters(model: nn.Module, path: str | Path, *, regions: Regions = None) -> RegionAdapters:
    """Put saved adapters on a model.

    Args:
        model: The model that they were trained with, with its own weights.
        path: A file that [`AdapterSet.save`][attnguide.adapters.AdapterSet.save] wrote.
        regions: See [`attach`][attnguide_segmentation.adapted.attach]; a parser is not saved with adapters.

    Returns:
        The adapters on the model, on its device.

    Raises:
        DataError: If the file is missing, or not of that format.
        LayerError: If the model lacks a layer.
    """
    saved = SavedAdapters(path)
    finder = _finder(
        regions, max((len(settings.get("names", ())) for settings in saved.settings), default=0) or 7
    )
    return _put_on(model, saved.make(KINDS, regions=finder), finder, None)


class Average(nn.Module):
    """Averages the scores of several models, as the publication combines SSP and SSG.

    Args:
        models: The models; each gives logits `(B, K)`.

    Raises:
        InputError: If `models` is empty.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise InputError("models is empty; there is nothing to average.")
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Average the logits `(B, K)`."""
        return torch.stack([find_logits(model(images)) for model in self.models]).mean(dim=0)


def _put_on(
    model: nn.Module,
    adapters: Sequence[Adapter],
    finder: RegionFinder,
    images: Tensor | None,
    measure: bool = True,
) -> RegionAdapters:
    companions = [] if finder.module is None else [finder.module]
    on_model = RegionAdapters.put_on(model, adapters, images, companions=companions, measure=measure)
    on_model.finder = finder
    return on_model


def _finder(regions: Regions, count: int = 7) -> RegionFinder:
    return regions if isinstance(regions, RegionFinder) else RegionFinder(regions, count)
