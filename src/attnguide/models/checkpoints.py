"""Reads weights from files without running code from a file."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attnguide.data.files import check_file
from attnguide.errors import DataError, InputError

__all__ = ["digest", "load_into", "read_weights"]

#: Keys under which training scripts save the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
#: Prefixes that parallel training, `torch.compile` and Lightning add to every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_LISTED = 5
#: So many dictionaries may lie around the weights; one may even hold itself.
_DEEPEST = 8


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a `.safetensors` file, or in a PyTorch checkpoint of tensors and plain values.

    Dictionaries around the weights (`state_dict`, `model`, `model_state_dict`) and prefixes that all names
    share (`module.`) are removed.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        DataError: If the file cannot be read, holds no weights, or holds objects that could only be restored
            by running code from it.
    """
    path = check_file(path)
    if path.suffix == ".safetensors":
        try:
            return _without_prefix(load_file(path))
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} is not a safetensors file: {error}. Download or export it again."
            ) from error
    _check_kind(path)
    try:
        # timm's training script also saves its command-line options, which are plain values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about odd pickles, which are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(_refusal(path, str(error))) from error
    # A truncated file, or one of another kind, fails with various errors of the reader.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "TorchScript archive" in reason or "data.pkl" in reason:
            kind = "scripted or traced" if "TorchScript" in reason else "exported"
            raise DataError(
                f"{path} holds a program, as of a {kind} model, and no weights alone. Save the weights of "
                "the model as it was before: torch.save(model.state_dict(), 'weights.pt')."
            ) from error
        raise DataError(
            f"{path} is not a checkpoint of PyTorch: {reason}. Give a .safetensors file, or one of "
            "torch.save."
        ) from error
    return _without_prefix(_unwrapped(content, path))


#: How files begin that are often saved in place of a checkpoint, and what they are.
_OTHERS = {
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML file",
    b"version https://git-lfs": "a Git LFS pointer",
    b"{": "a JSON file",
}


def _check_kind(path: Path) -> None:
    """Refuse a file of another kind, such as the page of a download that failed."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    for begins, what in _OTHERS.items():
        if start.startswith(begins):
            raise DataError(f"{path} is {what}, not a checkpoint. Download the file itself again.")


def _refusal(path: Path, reason: str) -> str:
    match = re.search(r"GLOBAL (\S+)", reason)
    what = f"a Python object ({match[1]})" if match else "more than tensors and plain values"
    return (
        f"{path} holds {what}. Such a pickle can run any code, so attnguide never unpickles one. "
        "If you trust the file, load it yourself, save the weights with "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors') and give that."
    )


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = dict(content) if isinstance(content, Mapping) else {}
    weights = {
        name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        keys = f" with {', '.join(map(repr, list(entries)[:_LISTED]))}" if entries else ""
        raise DataError(
            f"{path} holds no weights but a {type(content).__name__}{keys}. Save model.state_dict(), alone "
            "or as 'state_dict'."
        )
    return weights


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*_PREFIXES, *_PREFIXES):  # two rounds, because they nest in any order
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_into(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights into a model with exactly these names and shapes.

    A prefix is removed where all names of the model follow it: averaged models and trainers put one before
    the weights of the model, and may save others beside them, which are left out.

    Args:
        model: The model.
        weights: Tensors by name.
        path: File of the weights, for the error.

    Raises:
        InputError: If names or shapes differ, or values cannot be weights; some of them are listed.
    """
    expected = model.state_dict()
    weights = _fitted(weights, expected, path)
    for name in expected:
        if name in weights:
            _check_values(name, weights[name], expected[name], path)
    # Checkpoints from before PyTorch 0.4.1 lack this counter, which evaluation does not use.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        listed = "; ".join(f"{_some(names)} {what}" for what, names in problems if names)
        raise InputError(
            f"{path} does not fit {type(model).__name__}: {listed}. Name the model that it belongs to "
            "(and its number of classes)."
        )
    model.load_state_dict(dict(weights), strict=False)


def _fitted(weights: Mapping[str, Tensor], names: Iterable[str], path: str | Path) -> Mapping[str, Tensor]:
    """Remove the prefix before the names of a model, and leave out what has another one."""
    needed = [name for name in names if not name.endswith("num_batches_tracked")]
    if not needed or all(name in weights for name in needed):
        return weights
    ends = {name.removesuffix(needed[0]) for name in weights if name.endswith("." + needed[0])}
    prefixes = sorted(prefix for prefix in ends if all(prefix + name in weights for name in needed))
    if len(prefixes) > 1:
        raise InputError(
            f"{path} holds {len(prefixes)} sets of weights that fit, {', '.join(map(repr, prefixes))} before "
            "their names. Save the one to use in a file of its own."
        )
    if not prefixes:
        return weights
    (prefix,) = prefixes
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _check_values(name: str, value: Tensor, expected: Tensor, path: str | Path) -> None:
    """Refuse what has no values, or values of another kind than the weight that it is for."""
    wrong = None
    if value.is_meta:
        wrong = "has no values (it is on the meta device)"
    elif value.layout != torch.strided or value.is_quantized or value.is_nested:
        wrong = "is a sparse, quantized or nested tensor"
    elif value.is_complex() != expected.is_complex():
        wrong = f"is of type {value.dtype}, not {expected.dtype}"
    elif value.is_floating_point() and bool(value.isnan().any()):
        wrong = "contains NaN"
    if wrong is not None:
        raise InputError(f"{path}: {name} {wrong}. Save finite, dense weights: model.state_dict().")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        DataError: If it cannot be read.
    """
    path = check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
