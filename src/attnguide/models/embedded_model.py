"""The small classifier of faces that is part of the library, and files of its format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnguide.data.files import atomic_write, check_file
from attnguide.errors import AttnGuideError, DataError
from attnguide.models.checkpoints import load_into
from attnguide.models.loaded_model import LoadedModel
from attnguide.models.networks import small_cnn

__all__ = ["EMBEDDED", "embedded", "write_embedded"]

#: File of the classifier that is part of the library.
EMBEDDED = Path(__file__).parent / "faces.safetensors"

_KEYS = ("classes", "size", "width", "reduction", "mean", "std", "multi_label")


def embedded(path: str | Path | None = None) -> LoadedModel:
    """Load the small classifier of faces that is part of the library, or another file of its format.

    Args:
        path: A file that [`write_embedded`][attnguide.models.write_embedded] wrote; by default
            the one in the package.

    Returns:
        The classifier in evaluation mode.

    Raises:
        DataError: If the file is missing or not of that format.
    """
    if path is None and not EMBEDDED.is_file():
        raise DataError(
            f"{EMBEDDED} does not exist: this installation lacks the embedded classifier. Reinstall "
            "attnguide, or name a model."
        )
    path = check_file(EMBEDDED if path is None else path)
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in _KEYS}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        classes, side = tuple(str(name) for name in about["classes"]), _whole(about, "size", 8, 4096)
        mean, std = (_channels(about, key) for key in ("mean", "std"))
        if min(std) <= 0:
            raise ValueError(f"std={list(std)} must be positive")
        if not classes or not isinstance(about["classes"], list):
            raise ValueError("classes is empty, or no list")
        width, reduction = _whole(about, "width", 1, 1024), _whole(about, "reduction", 1, 64)
        model = small_cnn(len(classes), width=width, reduction=reduction)
        multi_label = bool(about["multi_label"])
    except (
        *(SafetensorError, AttnGuideError, OSError, RecursionError),
        *(ValueError, TypeError, KeyError, ArithmeticError),
    ) as error:
        raise DataError(
            f"{path} is not a classifier that attnguide saved ({type(error).__name__}: {error}). For weights "
            "of another kind, name the model that they belong to."
        ) from error
    load_into(model, weights, path)
    return LoadedModel(
        model.eval(),
        classes,
        _transform(side, mean, std),
        mean,
        std,
        multi_label,
        f"attnguide/{path.stem}",
        (side, side),
        "embedded",
    )


def _whole(about: Mapping[str, Any], key: str, least: int, most: int) -> int:
    """Return an integer of the metadata, which must lie in a range."""
    value = about[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key}={value!r} must be a whole number from {least} to {most}")
    return value


def _channels(about: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Return a value for each of three channels."""
    values = tuple(float(value) for value in about[key])
    if len(values) != 3 or not all(map(isfinite, values)):
        raise ValueError(f"{key}={about[key]!r} must be three finite numbers")
    return values


def write_embedded(
    path: str | Path,
    model: nn.Module,
    *,
    classes: Sequence[str],
    size: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    reduction: int = 4,
    multi_label: bool = True,
) -> None:
    """Save a [`small_cnn`][attnguide.models.small_cnn] with its preprocessing and class names.

    Args:
        path: The `.safetensors` file, written atomically.
        model: The network.
        classes: Name of each class.
        size: Side of the square images in pixels.
        width: The network's `width`.
        reduction: The network's `reduction`.
        mean: Value that was subtracted from each channel of an image in [0, 1].
        std: Value that each channel was then divided by.
        multi_label: Whether an image can have several classes.

    Raises:
        InputError: If the file cannot be written.
    """
    values = (list(classes), size, width, reduction, list(mean), list(std), multi_label)
    about = {key: json.dumps(value) for key, value in zip(_KEYS, values, strict=True)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=about)


def _transform(side: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    from torchvision import transforms

    steps = [
        transforms.Resize(side),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    transform: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return transform
