"""Builds image classifiers of transformers, from a folder or by their name on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from attnguide.errors import DataError, InputError, MissingPackageError
from attnguide.models._building import TRANSFORMERS, count_classes, reproducible
from attnguide.models._downloading import downloading
from attnguide.models.loaded_model import LoadedModel

#: What most folders are read as.
CLASSIFIER = "a classifier"


def build(
    name: str, weights: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> LoadedModel:
    """Build an image classifier of transformers; of a folder with its weights, if no others are given.

    `weights` only determine the number of classes if it is not given.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    except ImportError as error:
        raise MissingPackageError(name, "transformers", "transformers") from error
    where = name.removeprefix(TRANSFORMERS)
    folder = folder_of(where, name)
    with reading(where, folder):
        config: Any = AutoConfig.from_pretrained(where)
        processor: Any = AutoImageProcessor.from_pretrained(where)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"{name} is a {config.model_type} model, for which transformers has no image classifier. Name a "
            "model whose class is …ForImageClassification."
        )
    if getattr(config, "num_channels", 3) != 3:
        raise InputError(f"{name} takes images of {config.num_channels} channels; only RGB is supported.")
    if num_classes is None and weights is not None:
        num_classes = count_classes(weights, "classifier")
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    replaced = num_classes is not None
    own_weights = pretrained or (folder is not None and weights is None)
    with reproducible(), reading(where, folder), quiet():
        if own_weights:
            model, info = AutoModelForImageClassification.from_pretrained(
                where, config=config, ignore_mismatched_sizes=replaced, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        else:
            model, info = AutoModelForImageClassification.from_config(config), {"missing_keys": ()}
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{name} has no weights for {missing[0]!r}{more}: it is not a trained classifier. Train one from "
            "it, and give that."
        )
    prepare = _Prepared(processor)
    sample = prepare(Image.new("RGB", (320, 240)))
    mean, std = normalization(processor)
    return LoadedModel(
        model.float(),
        _class_names(config),
        prepare,
        mean,
        std,
        config.problem_type == "multi_label_classification",
        name,
        (sample.shape[1], sample.shape[2]),
        "pretrained" if own_weights else "random",
    )


def folder_of(where: str, name: str) -> Path | None:
    """The folder that a name means; None for a name of the hub.

    Raises:
        DataError: If it looks like a folder, and is none, or not one of a model.
    """
    folder = Path(where).expanduser()
    if not where or (not folder.is_dir() and (where[0] in "./~" or where.count("/") > 1)):
        raise DataError(
            f"{name}: there is no folder {where!r}. Give {TRANSFORMERS}FOLDER, as save_pretrained writes it, "
            f"or {TRANSFORMERS}OWNER/NAME of the hub."
        )
    if not folder.is_dir():
        return None
    for file, remedy in (
        ("config.json", "model.save_pretrained(folder) writes it"),
        ("preprocessor_config.json", "image_processor.save_pretrained(folder) writes it"),
    ):
        if not (folder / file).is_file() and not (folder / "processor_config.json").is_file():
            raise DataError(f"{folder} holds no {file}: {remedy}.")
    return folder


@contextmanager
def reading(where: str, folder: Path | None, what: str = CLASSIFIER) -> Iterator[None]:
    """Turn the errors of transformers into one of the library.

    Raises:
        DataError: If a folder cannot be read, or a model neither downloaded nor found in the cache.
    """
    if folder is None:
        remedy = () if what == CLASSIFIER else (f"give {TRANSFORMERS}FOLDER, as save_pretrained writes it",)
        with downloading(where, True, *remedy):
            yield
        return
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{folder} cannot be read as {what} of transformers: {reason} It must hold config.json, "
            "preprocessor_config.json and model.safetensors, as save_pretrained writes them."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what transformers says about weights, which are checked here, and its progress bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class _Prepared:
    """Turns an RGB image into the model's input, as the model's own image processor does.

    Attributes:
        processor: The image processor.
    """

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the input, `(3, H, W)`."""
        values: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return values


def normalization(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the processor normalizes by; 0 and 1 if it does not."""
    if not getattr(processor, "do_normalize", False):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = (
        (values,) * 3 if isinstance(values, (int, float)) else tuple(map(float, values))
        for values in (processor.image_mean, processor.image_std)
    )
    return mean, std


def _class_names(config: Any) -> tuple[str, ...]:
    """Names of the classes, each the first of its synonyms; numbers where nobody gave names."""
    names = [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]
    return tuple(
        f"class {index}" if name == f"LABEL_{index}" else name.partition(",")[0]
        for index, name in enumerate(names)
    )
