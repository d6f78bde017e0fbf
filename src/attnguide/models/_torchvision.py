"""Builds classifiers of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnguide.errors import InputError
from attnguide.models._building import TORCHVISION, class_names, count_classes, reproducible, unknown_model
from attnguide.models._downloading import downloading
from attnguide.models.loaded_model import LoadedModel


def build(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    """Build a model of torchvision; `weights` only determine the number of classes if it is not given."""
    from torchvision import models

    short = name.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if short not in known:
        raise unknown_model(short, known, "Without the prefix, names are those of timm.")
    published = models.get_model_weights(short).DEFAULT
    if pretrained and num_classes not in (None, 1000):
        raise InputError(
            f"the pretrained weights of {name} are for 1000 classes, not {num_classes}. Leave one of the two "
            "out."
        )
    # These two would otherwise warn that they initialise themselves, which takes them a minute.
    options: dict[str, Any] = (
        {"init_weights": False} if short in ("googlenet", "inception_v3") and not pretrained else {}
    )
    if num_classes is None and weights is not None:
        with torch.device("meta"):
            skeleton = models.get_model(short, weights=None, **options)
        # The name of the head differs; it is the last weight with a row for each class.
        heads = [key for key, value in skeleton.named_parameters() if value.ndim > 1 and len(value) == 1000]
        num_classes = count_classes(weights, heads[-1].removesuffix(".weight"))
    if num_classes is not None and not pretrained:
        options["num_classes"] = num_classes
    with reproducible(), downloading(name, pretrained):
        model = models.get_model(short, weights=published if pretrained else None, **options)
    transform = published.transforms()
    side = transform.crop_size[0]
    count = 1000 if num_classes is None else num_classes
    return LoadedModel(
        model,
        class_names(count, "imagenet-1k" if count == 1000 else None),
        transform,
        tuple(transform.mean),
        tuple(transform.std),
        False,
        name,
        (side, side),
        "random",
    )
