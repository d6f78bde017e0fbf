"""Builds classifiers of timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnguide.errors import DataError, InputError
from attnguide.models._building import (
    TIMM_PLACES,
    TORCHVISION,
    TRANSFORMERS,
    class_names,
    count_classes,
    reproducible,
    unknown_model,
)
from attnguide.models._downloading import downloading
from attnguide.models.loaded_model import LoadedModel

_FOLDER = "local-dir:"


def build(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    """Build a model of timm; `weights` only determine the number of classes if it is not given."""
    from timm.data import create_transform, infer_imagenet_subset, resolve_model_data_config  # type: ignore[attr-defined]

    if name.startswith(TIMM_PLACES):
        model: Any = _elsewhere(name, weights, pretrained, num_classes)
    else:
        model = _published(name, weights, pretrained, num_classes)
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if not names or len(names) != model.num_classes:
        names = class_names(model.num_classes, infer_imagenet_subset(model))
    return LoadedModel(
        model,
        tuple(map(str, names)),
        create_transform(**data, is_training=False),
        tuple(data["mean"]),
        tuple(data["std"]),
        False,
        name,
        tuple(data["input_size"][-2:]),
        "pretrained" if name.startswith(_FOLDER) and weights is None else "random",
    )


def _published(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> Any:
    """Build a model that timm knows by name."""
    import timm

    if not timm.is_model(name):
        raise unknown_model(
            name,
            timm.list_models(),
            f"Or one of torchvision as {TORCHVISION}NAME, of transformers as {TRANSFORMERS}NAME.",
        )
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise unknown_model(name, tagged, f"Weights that exist: {', '.join(tagged) or 'none'}.")
    if pretrained and not tagged:
        raise InputError(f"timm has no pretrained weights for {name!r}. Give a checkpoint, or another model.")
    config = timm.models.get_pretrained_cfg(name)
    if num_classes is None and weights is not None and config is not None:
        num_classes = count_classes(weights, _head_of(config))
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with reproducible(), downloading(name, pretrained):
        return timm.create_model(name, pretrained=pretrained, **options)


def _elsewhere(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> Any:
    """Build a model that lies on the hub, or in a folder, where its configuration lies too."""
    import timm

    folder = Path(name.removeprefix(_FOLDER)) if name.startswith(_FOLDER) else None
    if folder is not None and not (folder / "config.json").is_file():
        raise DataError(
            f"{name}: {folder} holds no config.json. timm.models.push_to_hf_hub and save_for_hf write it."
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    # The configuration is downloaded too; a folder comes with its weights.
    pretrained = pretrained or (folder is not None and weights is None)
    try:
        with reproducible(), downloading(name, folder is None):
            model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{folder} cannot be read as a model of timm: {error}.") from error
    if num_classes is None and weights is not None:
        classes = count_classes(weights, _head_of(model.default_cfg))
        if classes is not None and classes != model.num_classes:
            with reproducible():
                model.reset_classifier(classes)
    return model


def _head_of(config: Any) -> str:
    """Name of the classifier in a configuration, the first of several."""
    name = config.get("classifier") if isinstance(config, Mapping) else config.classifier
    return name if isinstance(name, str) else (name or ("",))[0]
