"""Readable names for the cases of parametrized tests, in place of counters such as `options3`."""

from __future__ import annotations

import enum
import linecache
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

#: Longer names are cut; pytest numbers those that become alike.
_LONGEST = 60
_MOST_VALUES = 8


def readable(value: Any) -> str | None:
    """Describe a case in one short line that is the same in every process; None to leave it to pytest."""
    if value is None or isinstance(value, (bool, int, float, complex, type, enum.Enum)):
        return None  # pytest's own names for these are good
    if isinstance(value, (str, bytes)) and 0 < len(value) <= _LONGEST:
        return None
    text = " ".join(_described(value).split()) or "blank"
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() > _MOST_VALUES:
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"tensor {value.tolist()}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_described(entry)}" for key, entry in value.items()) or "empty"
    if isinstance(value, (tuple, list, set, frozenset)):
        entries = (
            sorted(map(_described, value)) if isinstance(value, (set, frozenset)) else map(_described, value)
        )
        return f"({', '.join(entries)})"
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
        return _source_of(value)
    if isinstance(value, BaseException):
        return f"{type(value).__name__} {value}".strip()
    if isinstance(value, bytes):
        return repr(value[:_LONGEST])[2:-1]
    if isinstance(value, str):
        return value[: 2 * _LONGEST]
    if isinstance(value, (int, float, type(None))):
        return str(value)
    name = getattr(value, "__name__", None)
    if isinstance(name, str):
        return name
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def _source_of(function: FunctionType) -> str:
    """The text of a lambda behind its colon, from the positions that its code keeps."""
    code = function.__code__
    places = [place for place in code.co_positions() if place[0] and place[2] is not None and place[3]]
    places = [place for place in places if place[3] > place[2] or place[1] != place[0]]
    if not places:
        return "function"
    first, start = min((line, column) for line, _, column, _ in places)
    last, end = max((line, column) for _, line, _, column in places)
    lines = [linecache.getline(code.co_filename, line) for line in range(first, last + 1)]
    # Columns count bytes of UTF-8.
    lines[-1] = lines[-1].encode()[:end].decode(errors="ignore")
    lines[0] = lines[0].encode()[start:].decode(errors="ignore")
    return " ".join(" ".join(lines).split()) or "function"
