"""Turns image files into the input of a model, as the model or a given transform specifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from attnguide.data.images import find_images, read_image, to_rgb
from attnguide.errors import InputError
from attnguide.models._building import class_names
from attnguide.models.loaded_model import LoadedModel, check_aspect

__all__ = ["Pictures", "Preprocessing", "preprocessing_of"]

#: An image file, a folder or a pattern; an image; or several of these.
Pictures = str | Path | Image.Image | Sequence[str | Path | Image.Image]


@dataclass(frozen=True)
class Preprocessing:
    """How images become the input of a model.

    Attributes:
        transform: Turns an RGB image into a tensor `(C, H, W)`.
        mean: Value that it subtracts from each channel of an image in [0, 1]; empty if that is not known.
        std: Value that it then divides by.
        class_names: Names of the model's classes; empty if they are not known.
    """

    transform: Callable[[Image.Image], Any]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    def read(self, pictures: Pictures) -> tuple[Tensor, tuple[str, ...]]:
        """Read images and prepare them.

        Args:
            pictures: Files, folders, patterns such as `"photos/*.jpg"`, PIL images, or several of these.

        Returns:
            Images `(B, C, H, W)`, and the name of each: the stem of its file, or `image0`, `image1` …

        Raises:
            InputError: If a path names no image, or the transform gives no tensor, or tensors of several
                sizes.
            DataError: If a file cannot be read.
        """
        items: Sequence[Any] = [pictures] if isinstance(pictures, (str, Path, Image.Image)) else pictures
        prepared: list[Tensor] = []
        names: list[str] = []
        for item in items:
            if isinstance(item, Image.Image):
                opened = [(to_rgb(item, f"image {len(names)}"), f"image{len(names)}")]
            elif isinstance(item, (str, Path)):
                opened = [(read_image(path), path.stem) for path in find_images([item])]
            else:
                raise InputError(
                    f"images has {item!r:.60}: give a tensor (B, C, H, W), or paths and PIL images."
                )
            for image, name in opened:
                prepared.append(self._transformed(image, name))
                names.append(name)
        if not prepared:
            raise InputError("images is empty: give at least one path or PIL image.")
        sizes = sorted({tuple(image.shape) for image in prepared})
        if len(sizes) > 1:
            raise InputError(
                f"the transform gives images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}. "
                "Resize and crop them to one in the transform, or explain them one by one."
            )
        return torch.stack(prepared), tuple(names)

    def _transformed(self, image: Image.Image, name: str) -> Tensor:
        check_aspect(image, name)
        result = self.transform(image)
        if not isinstance(result, Tensor) or result.ndim != 3:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"the transform gives {shape} for {name}, expected a tensor (C, H, W).")
        return result


def preprocessing_of(model: nn.Module | LoadedModel, transform: Any = None) -> Preprocessing:
    """Find out how images become the input of a model.

    Known is that of a [`LoadedModel`][attnguide.models.LoadedModel], of models of timm (their
    `pretrained_cfg`), and of transformers' models whose image processor lies in their folder or in the cache.

    Args:
        model: The model.
        transform: What to use instead: a function of a PIL image, weights of torchvision such as
            `ResNet50_Weights.DEFAULT`, or an image processor of transformers.

    Raises:
        InputError: If the model says nothing about it and no transform is given, or the transform cannot be
            called.
    """
    names = model.classes if isinstance(model, LoadedModel) else _class_names(model)
    if transform is not None:
        return _given(transform, names)
    if isinstance(model, LoadedModel):
        return Preprocessing(model.transform, model.mean, model.std, names)
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]

        data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        made = create_transform(**data, is_training=False)
        return Preprocessing(made, tuple(data["mean"]), tuple(data["std"]), names)
    processor = _processor_of(model)
    if processor is not None:
        return _given(processor, names)
    raise InputError(
        f"it is not known how {type(model).__name__} wants its images. Give transform=: a function of a PIL "
        "image, weights.transforms() of torchvision, or an AutoImageProcessor of transformers."
    )


def _given(transform: Any, names: tuple[str, ...]) -> Preprocessing:
    """Wrap a function, weights of torchvision, or an image processor of transformers."""
    if isinstance(getattr(transform, "meta", None), dict) and callable(
        getattr(transform, "transforms", None)
    ):
        names = names or tuple(transform.meta.get("categories", ()))
        transform = transform.transforms()
    if not callable(transform):
        raise InputError(f"transform={transform!r:.60} must be a function of a PIL image.")
    if hasattr(transform, "image_mean"):
        processor = transform
        known = _normalizes(processor)
        return Preprocessing(
            lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
            _numbers(processor.image_mean) if known else (),
            _numbers(processor.image_std) if known else (),
            names,
        )
    # torchvision's presets have mean and std themselves, a Compose in its Normalize.
    for step in (transform, *getattr(transform, "transforms", ())):
        mean, std = (_numbers(getattr(step, key, None)) for key in ("mean", "std"))
        if mean and len(mean) == len(std):
            return Preprocessing(transform, mean, std, names)
    return Preprocessing(transform, class_names=names)


def _normalizes(processor: Any) -> bool:
    return bool(getattr(processor, "do_normalize", True)) and bool(_numbers(processor.image_mean))


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        return ()


def _processor_of(model: nn.Module) -> Any:
    """Load the image processor of a model of transformers from its folder or the cache; None without one."""
    name = getattr(model, "name_or_path", "")
    if not name or not isinstance(name, str) or not type(model).__module__.startswith("transformers."):
        return None
    from transformers import AutoImageProcessor  # the model is transformers', so it is installed

    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # there is none
        return None


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes of a model of transformers or timm, as far as they are known."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, dict):
        return tuple(str(label) for label in labels.values())
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        from timm.data import infer_imagenet_subset  # type: ignore[attr-defined]

        subset = infer_imagenet_subset(model)
        return class_names(int(model.num_classes), subset) if subset else ()  # type: ignore[arg-type]
    return ()
