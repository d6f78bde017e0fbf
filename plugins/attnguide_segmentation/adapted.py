"""Puts SSP, SSG and their like on a model, and loads them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.adapters import saving
from attnguide.adapters.saving import SavedAdapters, feature_sizes
from attnguide.capture.calls import find_logits
from attnguide.errors import InputError, UnknownNameError
from attnguide.interfaces import Adapter
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.gating import SSG, MaskChannels, Start
from attnguide_segmentation.hosts import find_gate, first_convolution
from attnguide_segmentation.pooling import SSP, PyramidPooling
from attnguide_segmentation.regions import REGIONS

__all__ = ["KINDS", "METHODS", "Adapted", "Average", "attach", "load_adapters"]

#: The adapters of this plugin, by the names that they are saved with.
KINDS: tuple[str, ...] = (SSP.name, SSG.name, PyramidPooling.name, MaskChannels.name)

#: What `attach` puts on a model.
METHODS: tuple[str, ...] = ("ssp", "ssg", "average", "pyramid", "mask_channels", "boxes")

Regions = RegionFinder | Callable[[Tensor], Tensor] | None


class Adapted(saving.Adapted):
    """A guide whose adapters can be saved apart from the model.

    Made by [`attach`][attnguide_segmentation.adapted.attach] and
    [`load_adapters`][attnguide_segmentation.adapted.load_adapters]; it takes terms of guidance like any
    other.

    Attributes:
        finder: Where the region masks come from; `finder.give(masks)` before a forward pass takes your own.
    """

    finder: RegionFinder

    def _companions(self) -> list[nn.Module]:
        return [] if self.finder.module is None else [self.finder.module]


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
    **guide: Any,
) -> Adapted:
    """Put SSP, SSG, or what they were compared with, on a model, whatever it is.

    ```python
    adapted = attach(model, images[:2], "ssp")
    optimizer = torch.optim.AdamW([*model.parameters(), *adapted.parameters()])
    logits = model(images)  # the adapter's
    adapted.save("ssp.safetensors")
    adapted.remove()
    ```

    Args:
        model: Any classifier.
        images: Some images, `(B, 3, H, W)`, as in training; places and channels are found with them.
        *methods: One or several of `"ssp"`, which pools inside the regions; `"ssg"`, which gates by them;
            `"average"` pooling; `"pyramid"` (SPPNet*); `"mask_channels"` (the naive way); `"boxes"`: SSP
            with 16 boxes in place of the seven regions, which `regions` has to give.
        layer: Where features are pooled.
        gate: Where SSG gates: a layer's name, or as in `"stage:1"`; by default the stage whose grid is
            nearest to an eighth of the image's.
        start: How SSG begins; see [`SSG`][attnguide_segmentation.gating.SSG].
        normalize: Whether SSP's regions compete on equal terms; see
            [`SSP`][attnguide_segmentation.pooling.SSP].
        classes: K, if the adapter is to answer for others than the model does.
        regions: Gives masks for images; by default the parser that comes along, for drawn faces.
        **guide: Further arguments of [`Guide`][attnguide.Guide], as `terms=[…]`.

    Returns:
        The guide that holds the adapters, on the model's device.

    Raises:
        UnknownNameError: If there is no such method.
        InputError: If none is named.
        LayerError: If the model has no such layer, or one that cannot be gated.
    """
    if not methods:
        raise InputError(f"nothing to attach: name one of {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if "boxes" in methods and {"ssg", "mask_channels"} & set(methods):
        raise InputError(
            "boxes are 16 regions, and ssg and mask_channels take seven: attach them to models of their own."
        )
    finder = _finder(regions, 16 if "boxes" in methods else 7)
    adapters: list[Adapter] = []
    with torch.inference_mode(False):  # else the weights could not be trained
        if "mask_channels" in methods:
            name, first = first_convolution(model, images)
            padding = first.padding if isinstance(first.padding, str) else tuple(first.padding)
            sizes = (first.kernel_size, first.stride, padding, first.dilation)
            adapters.append(MaskChannels(first.out_channels, *sizes, after=name, regions=finder))
        if "ssg" in methods:
            place = find_gate(model, images, gate)
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
            raise InputError(f"{', '.join(pooling)} all answer in place of the model; name one of them.")
        if pooling:
            channels, answers = feature_sizes(model, images, layer)
            answers = answers if classes is None else classes
            if pooling[0] in ("average", "pyramid"):
                levels = (1,) if pooling[0] == "average" else (1, 2)
                adapters.append(PyramidPooling(channels, answers, levels=levels, layer=layer))
            else:
                names = REGIONS if pooling[0] == "ssp" else [f"box{number}" for number in range(finder.count)]
                adapters.append(
                    SSP(channels, answers, regions=finder, layer=layer, names=names, normalize=normalize)
                )
    return _adapted(model, adapters, finder, images, guide)


def load_adapters(model: nn.Module, path: str | Path, *, regions: Regions = None, **guide: Any) -> Adapted:
    """Put adapters on a model as they were saved.

    Args:
        model: The model that they were trained with, with its own weights.
        path: A file that [`Adapted.save`][attnguide.adapters.Adapted.save] wrote.
        regions: As for [`attach`][attnguide_segmentation.adapted.attach]; a parser is not saved along.
        **guide: Further arguments of [`Guide`][attnguide.Guide].

    Returns:
        The guide that holds them, on the model's device.

    Raises:
        DataError: If the file is missing, or not of that format.
        LayerError: If the model lacks a layer.
    """
    saved = SavedAdapters(path)
    finder = _finder(regions, max((len(one.get("names", ())) for one in saved.settings), default=0) or 7)
    return _adapted(model, saved.make(KINDS, regions=finder), finder, None, guide)


class Average(nn.Module):
    """Averages the scores of several models, as the publication combines SSP and SSG.

    Args:
        models: The models; each gives logits `(B, K)`.

    Raises:
        InputError: If there are none.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise InputError("models is empty; there is nothing to average.")
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Average the logits `(B, K)`."""
        return torch.stack([find_logits(model(images)) for model in self.models]).mean(dim=0)


def _adapted(
    model: nn.Module,
    adapters: Sequence[Adapter],
    finder: RegionFinder,
    images: Tensor | None,
    guide: dict[str, Any],
) -> Adapted:
    made = Adapted.put_on(model, adapters, images, **guide)
    made.finder = finder
    return made


def _finder(regions: Regions, count: int = 7) -> RegionFinder:
    return regions if isinstance(regions, RegionFinder) else RegionFinder(regions, count)
