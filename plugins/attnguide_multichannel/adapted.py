"""Puts multi-channel attention on a model, and loads it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.adapters.saving import Adapted, SavedAdapters, feature_sizes
from attnguide.errors import InputError
from attnguide.guiding.guide import Guide
from attnguide_multichannel.attention import MultiChannel

__all__ = ["attach", "load_adapters", "multichannel_of"]


def attach(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str = "auto",
    classes: int | None = None,
    maps: int = 32,
    multi_label: float = 0.5,
    reconstruction: float = 0.1,
    **guide: Any,
) -> Adapted:
    """Put multi-channel attention on a model, whatever it is.

    ```python
    adapted = attach(model, images[:2])
    optimizer = torch.optim.AdamW([*model.parameters(), *adapted.parameters()])
    loss = criterion(model(images), labels) + adapted.loss(labels)
    adapted.save("attention.safetensors")
    adapted.remove()
    ```

    Args:
        model: Any classifier.
        images: Some images, `(B, 3, H, W)`, as in training; channels are found with them.
        layer: The layer whose features are masked.
        classes: K, if the adapter is to answer for others than the model does.
        maps: See [`MultiChannel`][attnguide_multichannel.attention.MultiChannel], as for the next two.
        multi_label: α.
        reconstruction: β.
        **guide: Further arguments of [`Guide`][attnguide.Guide], as `terms=[…]`.

    Returns:
        The guide that holds the adapter, on the model's device.

    Raises:
        InputError: If a number is too small.
        LayerError: If the model has no such layer.
    """
    channels, answers = feature_sizes(model, images, layer)
    with torch.inference_mode(False):  # else the weights could not be trained
        adapter = MultiChannel(
            channels,
            answers if classes is None else classes,
            image_channels=images.shape[1],
            maps=maps,
            multi_label=multi_label,
            reconstruction=reconstruction,
            layer=layer,
        )
    return Adapted.put_on(model, [adapter], images, **guide)


def load_adapters(model: nn.Module, path: str | Path, **guide: Any) -> Adapted:
    """Put multi-channel attention on a model as it was saved.

    Args:
        model: The model that it was trained with, with its own weights.
        path: A file that `adapted.save` wrote.
        **guide: Further arguments of [`Guide`][attnguide.Guide].

    Returns:
        The guide that holds it, on the model's device.

    Raises:
        DataError: If the file is missing, or not of that format.
        LayerError: If the model lacks the layer.
    """
    return Adapted.put_on(model, SavedAdapters(path).make([MultiChannel.name]), **guide)


def multichannel_of(guide: Guide) -> MultiChannel:
    """Return the multi-channel attention that a guide holds.

    Raises:
        InputError: If it holds none.
    """
    for adapter in guide.adapters:
        if isinstance(adapter, MultiChannel):
            return adapter
    raise InputError("the guide holds no multi-channel attention; make it with attach(model, images).")
