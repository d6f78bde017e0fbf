"""Builds classifiers of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnguide.errors import InputError
from attnguide.models._building import TORCHVISION, class_names, count_classes, reproducible, unknown_model
from attnguide.models._downloading import downloading
from attnguide.models.loaded_model import LoadedModel


def build(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    """Build a model of timm; `weights` only determine the number of classes if it is not given."""
    import timm
    from timm.data import create_transform, infer_imagenet_subset, resolve_model_data_config  # type: ignore[attr-defined]

    if not timm.is_model(name):
        raise unknown_model(name, timm.list_models(), f"Or one of torchvision as {TORCHVISION}NAME.")
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise unknown_model(name, tagged, f"Weights that exist: {', '.join(tagged) or 'none'}.")
    if pretrained and not tagged:
        raise InputError(f"timm has no pretrained weights for {name!r}. Give a checkpoint, or another model.")
    config = timm.models.get_pretrained_cfg(name)
    if num_classes is None and weights is not None and config is not None:
        head = config.classifier if isinstance(config.classifier, str) else (config.classifier or ("",))[0]
        num_classes = count_classes(weights, head)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with reproducible(), downloading(name, pretrained):
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    subset = infer_imagenet_subset(model)
    return LoadedModel(
        model,
        class_names(model.num_classes, subset),
        create_transform(**data, is_training=False),
        tuple(data["mean"]),
        tuple(data["std"]),
        False,
        name,
        tuple(data["input_size"][-2:]),
        "random",
    )
