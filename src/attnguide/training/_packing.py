"""Packs nested plain values and tensors, such as the state of an optimizer, into one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnguide.data.files import atomic_write, check_file
from attnguide.errors import DataError

__all__ = ["load_packed", "save_packed"]

_KEY = "attnguide"


def save_packed(path: Path, values: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write nested dicts and lists of plain values and tensors; completely or not at all."""
    tensors: dict[str, Tensor] = {}
    plain = _pack(values, "", tensors)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={**(metadata or {}), _KEY: json.dumps(plain)})


def load_packed(path: Path) -> Any:
    """Read what `save_packed` wrote, with tensors on the CPU.

    Raises:
        DataError: If it is another file.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            plain = json.loads((file.metadata() or {})[_KEY])
            return _unpack(plain, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a checkpoint of `attnguide train`: {error}.") from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy, since tensors that share memory are refused.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs, since the keys of an optimizer's state are numbers.
        return {
            "pairs": [
                [key, _pack(inner, f"{name}.{key}".strip("."), tensors)] for key, inner in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return [_pack(inner, f"{name}.{number}", tensors) for number, inner in enumerate(value)]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{name} is of type {type(value).__name__}, which a checkpoint cannot hold.")
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(inner, tensors) for key, inner in value["pairs"]}
    return [_unpack(inner, tensors) for inner in value] if isinstance(value, list) else value
