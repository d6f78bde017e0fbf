"""Settings of a training, as a TOML file holds them."""

from __future__ import annotations

import json
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attnguide.errors import InputError, nearest
from attnguide.guiding.recipe import as_recipe, load_recipe

__all__ = [
    "AugmentSettings",
    "DataSettings",
    "LoopSettings",
    "MaskSettings",
    "ModelSettings",
    "Settings",
    "read_settings",
]


def _number(default: Any, least: float, most: float = math.inf) -> Any:
    return field(default=default, metadata={"range": (least, most)})


@dataclass(frozen=True)
class DataSettings:
    """The table `[data]`; a text `data = "photos"` is its `path`.

    Attributes:
        path: A folder with a subfolder of images for each class, which may lie in its subfolders `train` and
            `val`; a table, CSV or Parquet, of files and labels; or CelebA's list of attributes, or the folder
            that holds it.
        validation: Share of the images of each class that is held out, in [0, 1), if nothing else says which
            these are; or the path of a folder or table of other images. 0: no validation.
        folder: Folder that the files of a table are relative to; by default that of the table.
        file: Column of the files; by default `file`, `image`, `path` or `filename`.
        label: Column of the class, a name or a number; by default `label`, `class`, `target` or `y`.
        attributes: Columns of attributes, which an image can have several of: 1, 0 or −1, or nothing if
            unknown. By default all other columns, if there is none of a class.
        split: Column that says `train`, `valid` or something else (also 0, 1, 2), if the table has it.
        mask: Column of the files of masks, if the table has it.
        classes: Names of the classes, in the order of the logits; by default those of the data, sorted.
    """

    path: Path
    validation: float | Path = 0.2
    folder: Path | None = None
    file: str | None = None
    label: str | None = None
    attributes: tuple[str, ...] | None = None
    split: str = "split"
    mask: str = "mask"
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ModelSettings:
    """The table `[model]`; a text `model = "resnet18"` is its `name`.

    Attributes:
        name: A model, as for [`models.load`][attnguide.models.load]: of timm, `torchvision/NAME` … None: the
            small one of the library, or that of a checkpoint which says what it is.
        pretrained: Begin with the published weights. `"auto"`: if they can be had, and otherwise from random
            weights, with a warning.
        checkpoint: File of weights to begin with instead; a head of another size is replaced.
        freeze: Names of modules, or beginnings of them, whose weights and statistics stay as they are.
            `"backbone"`: all but the head.
    """

    name: str | None = None
    pretrained: bool | Literal["auto"] = "auto"
    checkpoint: Path | None = None
    freeze: tuple[str, ...] | Literal["backbone"] = ()


@dataclass(frozen=True)
class MaskSettings:
    """The table `[masks]`; a text `masks = "masks"` is its `path`.

    Attributes:
        path: Masks of where to look, as for `attnguide evaluate`: a folder of masks named like the images, a
            folder with one for each class, or one image for all. None: those of a table's column alone.
        inside: Values that are inside, in masks of several values; see
            [`read_mask`][attnguide.masks.read_mask].
        complete: Give the images that have no mask a predicted one, as
            [`MaskCompletion`][attnguide.masks.MaskCompletion] learns it from those that have one, with the
            features of the model before the first step; if none has, from a table's column `boxes`.
    """

    path: Path | None = None
    inside: str | int | tuple[str | int, ...] | None = None
    complete: bool = False


@dataclass(frozen=True)
class AugmentSettings:
    """The table `[augment]`: how training images are varied, and their masks with them.

    Attributes:
        crop: Smallest share of an image's area that a random crop keeps, in (0, 1]; 1 for the model's own
            preprocessing.
        flip: Share of the images that are mirrored, in [0, 1]. 0 where left and right matter, as in text.
        rotate: Largest angle of a rotation, in degrees.
        jitter: Strength of random changes of brightness, contrast and saturation, in [0, 1].
    """

    crop: float = _number(0.7, 0.01, 1)
    flip: float = _number(0.5, 0, 1)
    rotate: float = _number(0.0, 0, 180)
    jitter: float = _number(0.0, 0, 1)

    @property
    def moves(self) -> bool:
        """Whether it moves what is in an image."""
        return self.crop < 1 or self.flip > 0 or self.rotate > 0


@dataclass(frozen=True)
class LoopSettings:
    """The table `[train]`.

    Attributes:
        epochs: Number of passes through the images.
        batch_size: Largest number of images of a step of the optimizer, in all processes and accumulated
            batches together; the images of an epoch are divided evenly into steps.
        learning_rate: Learning rate at its highest.
        optimizer: Optimizer, by timm's name.
        weight_decay: Weight decay.
        momentum: Momentum, for optimizers that have it.
        schedule: Schedule of the learning rate, by timm's name; `"none"` keeps it as it is.
        warmup_epochs: Number of epochs in which the learning rate rises.
        clip: Largest norm of the gradient; None for any.
        accumulate: Number of parts in which the images of a step run through the model.
        precision: `"no"`, `"bf16"` or `"fp16"`; None: what `accelerate launch` says, or else float32.
        task_weight: Weight of the classification loss.
        weights: λ to choose from where a method has `weight = "auto"`; by default none, and a tenth, the
            whole and ten times that of the recipe.
        search_epochs: Number of epochs for each of these; by default half of `epochs`.
        select: Which epoch's weights are kept: `"last"`; `"accuracy"`, the best on the validation images;
            `"swapped"`, the best on validation images with exchanged surroundings. `"auto"`: `"swapped"` if
            there are masks for validation, otherwise `"last"`.
        draws: Number of exchanges of each validation image.
        workers: Number of processes that read images.
        save_every: Number of steps after which a checkpoint is written, besides those at the end of epochs.
        seed: Seed of everything that is random.
        tensorboard: Write a log for TensorBoard, if it is installed.
    """

    epochs: int = _number(10, 1)
    batch_size: int = _number(32, 1)
    learning_rate: float = _number(3e-4, 0)
    optimizer: str = "adamw"
    weight_decay: float = _number(0.01, 0)
    momentum: float = _number(0.9, 0, 1)
    schedule: str = "cosine"
    warmup_epochs: int = _number(0, 0)
    clip: float | None = _number(None, 0)
    accumulate: int = _number(1, 1)
    precision: Literal["no", "bf16", "fp16"] | None = None
    task_weight: float = _number(1.0, 0)
    weights: tuple[float, ...] | None = None
    search_epochs: int | None = _number(None, 1)
    select: Literal["auto", "last", "accuracy", "swapped"] = "auto"
    draws: int = _number(4, 1)
    workers: int = _number(0, 0)
    save_every: int = _number(500, 1)
    seed: int = _number(0, 0)
    tensorboard: bool = True


@dataclass(frozen=True)
class Settings:
    """All settings of a training.

    Attributes:
        data: Images and labels.
        model: The model.
        masks: Masks of where to look; None if a prior needs none, or there is no guidance.
        recipe: Method of guidance by name; `"none"` for no guidance. None: the table `guide` or
            `intervention`, or else `right-for-real` if there are masks.
        guide: Fields of a [`Term`][attnguide.Term], which replace the recipe's. `weight` may be `"auto"`.
        intervention: Settings of an [`Intervention`][attnguide.Intervention], which replace the recipe's;
            `weight` may be `"auto"`.
        augment: How training images are varied.
        train: The loop.
        about: Any text.
    """

    data: DataSettings
    model: ModelSettings
    masks: MaskSettings | None = None
    recipe: str | None = None
    guide: Mapping[str, Any] | None = None
    intervention: Mapping[str, Any] | None = None
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    train: LoopSettings = field(default_factory=LoopSettings)
    about: str = ""

    def as_table(self) -> dict[str, Any]:
        """Return all settings as plain values; paths are absolute."""
        table: dict[str, Any] = _plain(self)
        return table

    def as_toml(self) -> str:
        """Return all settings as a TOML file, from which the same training can be run anywhere here."""
        table = self.as_table()
        lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)]
        for name, values in table.items():
            if isinstance(values, dict):
                lines += [
                    "",
                    f"[{name}]",
                    *(f"{_key(key)} = {_toml(value)}" for key, value in values.items()),
                ]
        return "\n".join(lines) + "\n"


#: A text stands for this field of a table.
_SHORT = {"data": "path", "model": "name", "masks": "path"}
#: Words that stand for a table.
_NONE = {"augment": {"none": AugmentSettings(crop=1.0, flip=0.0)}}


def read_settings(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a training.

    Args:
        source: A TOML file, to whose folder the paths in it are relative; the name of a recipe; or a dict
            like the file's content, with paths relative to the current folder.
        overrides: Further settings, which replace those of the source: values by their names with dots, such
            as `{"train.epochs": 3}`. Paths are relative to the current folder.

    Returns:
        The settings; of a recipe by name, its `[train]` replaces the defaults.

    Raises:
        InputError: If the file cannot be read, or a table or setting is unknown, missing, or of a wrong type
            or range. It names the file and the setting.
    """
    if isinstance(source, Mapping):
        content, folder, where = dict(source), Path(), "the settings"
    elif str(source).endswith(".toml"):
        content, folder, where = _load(Path(source)), Path(source).parent, str(source)
    else:
        content, folder, where = {"recipe": str(source)}, Path(), f"recipe {str(source)!r}"
    given = {name: _as_table(where, name, value) for name, value in content.items()}
    _resolve_paths(given, folder)
    for name, value in (overrides or {}).items():
        table, _, key = name.partition(".")
        if not key:
            given[table] = _as_table("the options", table, value)
        elif isinstance(inner := given.setdefault(table, {}), dict):
            inner[key] = value
        else:
            raise InputError(f"{where}: {table} = {inner!r} has no settings, so {name} cannot be set.")
    recipe = given.get("recipe")
    if isinstance(recipe, str) and recipe != "none":
        known = {each.name for each in fields(LoopSettings)}
        published = {key: value for key, value in load_recipe(recipe).train.items() if key in known}
        given["train"] = {**published, **_table(given.get("train", {}), where, "train")}
    for name in ("guide", "intervention"):
        if name in given:
            own = _table(given[name], where, name)
            fixed = {key: value for key, value in own.items() if (key, value) != ("weight", "auto")}
            as_recipe({name: fixed}, where, where)
    settings: Settings = _build(Settings, given, where, "")
    return settings


def _table(value: Any, where: str, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {name} = {value!r:.60} must be a table.")
    return value


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    # Nesting too deep is a RecursionError, and an integer of thousands of digits a plain ValueError.
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read as TOML: {reason}") from error


def _as_table(where: str, name: str, value: Any) -> Any:
    if isinstance(value, (str, Path)):
        if name in _SHORT:
            return {_SHORT[name]: value}
        if name in _NONE:
            if value not in _NONE[name]:
                raise InputError(f'{where}: {name} = {value!r:.40} must be a table, or "none".')
            return _plain(_NONE[name][value])
    return dict(value) if isinstance(value, Mapping) else value


def _resolve_paths(given: Mapping[str, Any], folder: Path) -> None:
    """Make the paths in a file relative to the current folder."""
    for name, kind in (("data", DataSettings), ("model", ModelSettings), ("masks", MaskSettings)):
        table = given.get(name)
        if not isinstance(table, dict):
            continue
        for key, hint in get_type_hints(kind).items():
            value = table.get(key)
            if Path in (hint, *get_args(hint)) and isinstance(value, str) and value:
                table[key] = folder / Path(value).expanduser()


def _build(kind: Any, table: Any, where: str, prefix: str) -> Any:
    table = _table(table, where, prefix.rstrip("."))
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for key in table:
        if key not in known:
            what = "setting" if prefix else "table"
            raise InputError(f"{where} has an unknown {what} {prefix}{key}.{nearest(str(key), known)}")
    values = {}
    for name, each in known.items():
        if name in table:
            values[name] = _value(table[name], hints[name], where, f"{prefix}{name}", each.metadata)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise InputError(
                f"{where} lacks {prefix}{name}. The least is data, model and masks; `attnguide train` alone "
                "shows an example."
            )
    return kind(**values)


def _value(value: Any, hint: Any, where: str, name: str, metadata: Mapping[str, Any]) -> Any:
    for option in _options(hint):
        if is_dataclass(option):
            return _build(option, value, where, f"{name}.")
        found, fits = _converted(value, option)
        if fits:
            low, high = metadata.get("range", (-math.inf, math.inf))
            # Written so that NaN fails too.
            if isinstance(found, (int, float)) and not low <= found <= high:
                limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                raise InputError(f"{where}: {name} = {value!r} must be a number {limit}.")
            return found
    raise InputError(f"{where}: {name} = {value!r:.60} must be {_described(hint)}.")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _converted(value: Any, option: Any) -> tuple[Any, bool]:
    """Return a value as one type of a setting has it, and whether it fits."""
    origin = get_origin(option)
    if origin is Literal:
        return value, value in get_args(option)
    if origin is tuple:
        inner = get_args(option)[0]
        if not isinstance(value, (list, tuple)):
            return None, False
        parts = [
            next((c for o in _options(inner) for c, fits in [_converted(v, o)] if fits), None) for v in value
        ]
        return tuple(parts), None not in parts
    if origin is not None or option is Mapping:
        return value, isinstance(value, Mapping)
    if option is Path:
        return Path(value) if isinstance(value, (str, Path)) else None, isinstance(
            value, (str, Path)
        ) and value != ""
    if option is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if good else None, good
    if option is int:
        return value, type(value) is int
    return value, isinstance(value, option)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _described(hint: Any) -> str:
    texts = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            texts += [json.dumps(each) for each in get_args(option)]
        elif get_origin(option) is tuple:
            texts.append("a list")
        elif option is not type(None):
            texts.append(_NAMES.get(option, "a table"))
    return " or ".join(texts)


def _plain(value: Any) -> Any:
    """Return a setting as TOML can hold it; what is None is left out."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {each.name: getattr(value, each.name) for each in fields(value)}
        return {name: _plain(inner) for name, inner in found.items() if inner is not None}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml(key)
