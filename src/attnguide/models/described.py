"""What a file of weights says about its model: its name and its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import nn

from attnguide.models.loaded_model import LoadedModel

__all__ = ["described", "metadata_of"]

#: Begins the name of the small networks of the library.
_EMBEDDED = "attnguide/"


def metadata_of(loaded: LoadedModel) -> dict[str, str]:
    """Describe a model in the metadata of a safetensors file of its weights.

    With it [`load`][attnguide.models.load] knows name and classes from the file alone.

    Args:
        loaded: The model.

    Returns:
        Texts by name, values as JSON.
    """
    about: dict[str, Any] = {"classes": list(loaded.classes), "multi_label": loaded.multi_label}
    if loaded.name.startswith(_EMBEDDED):
        blocks = cast(Any, loaded.model)
        pooled = any(isinstance(layer, nn.MaxPool2d) for layer in blocks.block3)
        about |= {"size": loaded.size[0], "mean": list(loaded.mean), "std": list(loaded.std)}
        about |= {"width": blocks.block1[0].out_channels, "reduction": 8 if pooled else 4}
    else:
        about["model"] = loaded.name
    return {key: json.dumps(value) for key, value in about.items()}


def described(path: str | Path) -> dict[str, Any]:
    """Read what a file of weights says about a model of a name; nothing if it says none.

    Args:
        path: Any file of weights.

    Returns:
        `model`, `classes` and `multi_label`, or an empty dict.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = {key: json.loads(metadata[key]) for key in ("model", "classes", "multi_label")}
    # A file that is broken is reported where its weights are read; other tools have metadata of their own.
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return {}
    good = isinstance(about["model"], str) and isinstance(about["classes"], list)
    return about if good and all(isinstance(name, str) for name in about["classes"]) else {}
