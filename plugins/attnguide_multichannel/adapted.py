"""Puts multi-channel attention on a model, and loads it again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from attnguide.adapters import AdapterSet, SavedAdapters, feature_sizes
from attnguide.errors import InputError
from attnguide_multichannel.attention import Masks, MultiChannel
from attnguide_multichannel.masking import FullMasks

__all__ = ["attach", "load_adapters", "multichannel_of"]


def attach(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str = "auto",
    classes: int | None = None,
    masks: Masks = "shared",
    maps: int | None = None,
    multi_label: float = 0.5,
    reconstruction: float = 0.1,
) -> AdapterSet:
    """Put multi-channel attention on any model.

    ```python
    adapted = attach(model, images[:2])
    optimizer = torch.optim.AdamW([*model.parameters(), *adapted.parameters()])
    loss = criterion(model(images), labels) + adapted.loss(labels)
    adapted.save("attention.safetensors")
    adapted.remove()
    ```

    Args:
        model: Any classifier.
        images: Some images, `(B, 3, H, W)`, as in training, to find numbers of channels.
        layer: Layer whose features are masked.
        classes: Number of classes K, if it differs from the model's.
        masks: How masks are computed: `"shared"`, as mixtures of shared maps, or `"full"`, each on its own;
            see [`MultiChannel`][attnguide_multichannel.attention.MultiChannel].
        maps: Number of shared maps, by default 32.
        multi_label: Weight α of the multi-label classifier.
        reconstruction: Weight β of the reconstructor.

    Returns:
        The adapter on the model, on its device; `ag.Guide(model, …, adapters=…)` guides a model with it.

    Raises:
        InputError: If a number is too small, `masks` is unknown, `maps` is given for full masks, or these are
            larger than the device's memory.
        LayerError: If the model has no such layer.
    """
    channels, outputs = feature_sizes(model, images, layer)
    count = outputs if classes is None else classes
    if masks == "full":
        FullMasks.check_fits(channels, count, images.device)
    with torch.inference_mode(False):  # else the weights could not be trained
        adapter = MultiChannel(
            channels,
            count,
            image_channels=images.shape[1],
            masks=masks,
            maps=maps,
            multi_label=multi_label,
            reconstruction=reconstruction,
            layer=layer,
        )
    return AdapterSet.put_on(model, [adapter], images)


def load_adapters(model: nn.Module, path: str | Path) -> AdapterSet:
    """Put saved multi-channel attention on a model.

    Args:
        model: The model that it was trained with, with its own weights.
        path: A file that `adapted.save` wrote.

    Returns:
        The adapter on the model, on its device.

    Raises:
        DataError: If the file is missing, or not of that format.
        LayerError: If the model lacks the layer.
    """
    return AdapterSet.put_on(model, SavedAdapters(path).make([MultiChannel.name]))


def multichannel_of(adapters: AdapterSet) -> MultiChannel:
    """Return the multi-channel attention among adapters.

    Raises:
        InputError: If there is none.
    """
    for adapter in adapters:
        if isinstance(adapter, MultiChannel):
            return adapter
    raise InputError("the adapters hold no multi-channel attention; make it with attach(model, images).")
