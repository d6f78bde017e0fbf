"""Puts SSP, SSG and their like on a model, saves them apart from it, and folds both into one module."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnguide.checkpoints import load_into
from attnguide.data.files import atomic_write, check_file
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.guide import Guide
from attnguide.hooks import Recorder, aside, unwrap
from attnguide.interfaces import Adapter
from attnguide.layers import find_layers
from attnguide.modes import evaluating
from attnguide.outputs import Call, find_logits
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.folded import Folded
from attnguide_segmentation.gating import SSG, MaskChannels, Start
from attnguide_segmentation.hosts import find_gate, first_convolution
from attnguide_segmentation.pooling import SSP, PyramidPooling
from attnguide_segmentation.regions import REGIONS

__all__ = ["KINDS", "METHODS", "Adapted", "Average", "attach", "load_adapters"]

#: The adapters of this plugin, by the name that a file of weights has for them.
KINDS: dict[str, type[Any]] = {
    "ssp": SSP,
    "ssg": SSG,
    "pyramid": PyramidPooling,
    "mask_channels": MaskChannels,
}

#: What `attach` puts on a model.
METHODS: tuple[str, ...] = ("ssp", "ssg", "average", "pyramid", "mask_channels", "boxes")

Regions = RegionFinder | Callable[[Tensor], Tensor] | None


class Adapted(Guide):
    """A guide whose adapters can be saved apart from the model.

    Made by [`attach`][attnguide_segmentation.adapted.attach] and
    [`load_adapters`][attnguide_segmentation.adapted.load_adapters]; it takes terms of guidance like any
    other.

    Attributes:
        finder: Where the region masks come from; `finder.give(masks)` before a forward pass takes your own.
    """

    finder: RegionFinder

    def save(self, path: str | Path) -> None:
        """Save settings and weights of the adapters, without the model and the parser.

        Args:
            path: The `.safetensors` file, written atomically.

        Raises:
            InputError: If an adapter is not of this plugin, or the file cannot be written.
        """
        about, weights = [], {}
        names = {kind: name for name, kind in KINDS.items()}
        for index, adapter in enumerate(self.adapters):
            if type(adapter) not in names:
                raise InputError(f"{type(adapter).__name__} is not saved; only {', '.join(KINDS)} are.")
            about.append({"kind": names[type(adapter)], **adapter.settings})  # type: ignore[dict-item]
            for name, value in adapter.state_dict().items():
                weights[f"{index}.{name}"] = value.detach().cpu().contiguous()
        with atomic_write(path) as temporary:
            save_file(weights, temporary, metadata={"adapters": json.dumps(about)})

    def fold(self, images: Tensor) -> Folded:
        """Take the adapters off the model, and make one module of the model, the adapters and the parser.

        Args:
            images: Some images, `(B, 3, H, W)`, of the size that it will be used with.

        Returns:
            A module that gives logits for images, to be exported, or used as it is. It holds the model
            itself, not a copy.
        """
        self._find_layers(Call.of((images,), {}))
        layers = iter(self._adapter_layers)
        adapters = self._adapter_modules()
        read = [None if adapter.layer is None else next(layers) for adapter in adapters]
        self.remove()
        return Folded(unwrap(self.model), adapters, read, self.finder)


def attach(
    model: nn.Module,
    images: Tensor,
    *methods: str,
    layer: str = "auto",
    gate: str | None = None,
    start: Start = "identity",
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
        classes: K, if the adapter is to answer for others than the model does.
        regions: Gives masks for images; by default the parser that comes along, for drawn faces.
        **guide: Further arguments of [`Guide`][attnguide.guide.Guide], as `terms=[…]`.

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
            channels, answers = _sizes(model, images, layer)
            answers = answers if classes is None else classes
            if pooling[0] in ("average", "pyramid"):
                levels = (1,) if pooling[0] == "average" else (1, 2)
                adapters.append(PyramidPooling(channels, answers, levels=levels, layer=layer))
            else:
                names = REGIONS if pooling[0] == "ssp" else [f"box{number}" for number in range(finder.count)]
                adapters.append(SSP(channels, answers, regions=finder, layer=layer, names=names))
    return _adapted(model, adapters, finder, images, guide)


def load_adapters(model: nn.Module, path: str | Path, *, regions: Regions = None, **guide: Any) -> Adapted:
    """Put adapters on a model as they were saved.

    Args:
        model: The model that they were trained with, with its own weights.
        path: A file that [`Adapted.save`][attnguide_segmentation.adapted.Adapted.save] wrote.
        regions: As for [`attach`][attnguide_segmentation.adapted.attach]; a parser is not saved along.
        **guide: Further arguments of [`Guide`][attnguide.guide.Guide].

    Returns:
        The guide that holds them, on the model's device.

    Raises:
        DataError: If the file is missing, or not of that format.
        LayerError: If the model lacks a layer.
    """
    path = check_file(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["adapters"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        count = max((len(settings.get("names", ())) for settings in about), default=0) or 7
        finder = _finder(regions, count)
        adapters: list[Adapter] = []
        for settings in about:
            kind = KINDS[settings.pop("kind")]
            sources = {} if kind is PyramidPooling else {"regions": finder}
            adapters.append(kind(**settings, **sources))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} does not hold adapters that attnguide saved ({type(error).__name__}: {error})."
        ) from error
    for index, adapter in enumerate(adapters):
        start = f"{index}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        load_into(adapter, own, path)
    return _adapted(model, adapters, finder, None, guide)


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
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    place = weight.device if images is None else images.device
    ready = [adapter.to(place, weight.dtype) for adapter in adapters]
    # Without a word about guidance, there is none.
    settings = guide if guide.keys() - {"second_order", "verify"} else {"terms": [], **guide}
    made = Adapted(model, adapters=ready, **settings)
    made.finder = finder
    return made


def _finder(regions: Regions, count: int = 7) -> RegionFinder:
    return regions if isinstance(regions, RegionFinder) else RegionFinder(regions, count)


def _sizes(model: nn.Module, images: Tensor, layer: str) -> tuple[int, int]:
    """Channels of a layer, and the number of classes."""
    found = find_layers(model, images, layer)[0]
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluating(model), aside(model)):
            stack.enter_context(context)
        recorder = Recorder(model)
        stack.callback(recorder.remove)
        recorder.attach([found.name])
        logits = find_logits(model(images[:1]))
        feature = recorder.shards[0].features[found.name]
    return found.layout.flat(feature).shape[1], logits.shape[1]
