"""Recipes: named settings of a method, as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from attnguide.errors import InputError, nearest
from attnguide.guiding.terms import Term
from attnguide.interfaces import AlignmentLoss, AttributionSource, TargetPrior
from attnguide.parts.hookspecs import Kind
from attnguide.parts.registry import registry

__all__ = ["Recipe", "as_recipe", "load_recipe"]

_PARTS: dict[str, type] = {"source": AttributionSource, "prior": TargetPrior, "loss": AlignmentLoss}
_SETTINGS = tuple(setting.name for setting in fields(Term))
_OF_INTERVENTION = ("weight", "divergence", "partners", "probability", "layer")


@dataclass(frozen=True)
class Recipe:
    """A method with its settings.

    Attributes:
        name: Name of the recipe.
        about: What it is and where it comes from.
        guide: Fields of [`Term`][attnguide.Term], parts already created.
        intervention: Settings of [`Intervention`][attnguide.Intervention], `weight`, `divergence` and
            `layer`, and of its [`SwapOutside`][attnguide.masks.SwapOutside], `partners` and `probability`;
            None if the method is none.
        train: Settings of the training that go with it, for the tools that train.
    """

    name: str
    about: str
    guide: dict[str, Any] = field(default_factory=dict)
    intervention: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a recipe by its registered name, or from a TOML file.

    A file has a table `[guide]` with fields of [`Term`][attnguide.Term], or a table `[intervention]` with
    settings of [`Intervention`][attnguide.Intervention], and may have a table `[train]` and a string
    `about`. A part is a name, or a table with a name and options:

    ```toml
    [guide]
    source = { name = "hires_cam", relu = false }
    ```

    Args:
        name_or_path: A name such as `"gradcam-iou"`, or a path that ends in `.toml`.

    Returns:
        The recipe.

    Raises:
        UnknownNameError: If the name is unknown.
        InputError: If the file cannot be read or holds an unknown setting.
    """
    if isinstance(name_or_path, Path) or str(name_or_path).endswith(".toml"):
        path = Path(name_or_path)
        name, where = path.stem, str(path)
        read = path.read_text
    else:
        name, where = name_or_path, f"recipe {name_or_path!r}"
        read = registry().load_part("recipe", name).read_text
    try:
        content = tomllib.loads(read(encoding="utf-8"))
    # Nesting too deep is a RecursionError, and an integer of thousands of digits a plain ValueError.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as a recipe: {error}") from error
    return as_recipe(content, name, where)


def as_recipe(content: Mapping[str, Any], name: str, where: str) -> Recipe:
    """Make a recipe of the content of a file; arguments are its name, and where it stands, for errors.

    Raises:
        UnknownNameError: If a part is unknown.
        InputError: If there is an unknown setting.
    """
    _check_keys(where, "table", content, ("about", "guide", "intervention", "train"))
    guide = content.get("guide", {})
    _check_keys(where, "setting", guide, _SETTINGS)
    settings = {key: _part(where, key, value) if key in _PARTS else value for key, value in guide.items()}
    intervention = content.get("intervention")
    if intervention is not None:
        _check_keys(where, "setting", intervention, _OF_INTERVENTION)
        if "guide" in content:
            raise InputError(f"{where} has both tables, [guide] and [intervention]; a recipe is one method.")
    train = content.get("train", {})
    if not isinstance(train, Mapping):
        raise InputError(f"{where}: train = {train!r} must be a table.")
    return Recipe(name, str(content.get("about", "")), settings, intervention, dict(train))


def _part(where: str, kind: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        options = dict(value)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise InputError(
                f'{where}: {kind} = {dict(value)} has no name; write {{ name = "…", option = … }}.'
            )
        return registry().create(cast(Kind, kind), name, _PARTS[kind], **options)
    if not isinstance(value, str):
        raise InputError(f"{where}: {kind} = {value!r} must be a name or a table with a name.")
    return value


def _check_keys(where: str, what: str, content: Any, known: tuple[str, ...]) -> None:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: {content!r} must be a table.")
    for key in content:
        if key not in known:
            raise InputError(f"{where} has an unknown {what} {key!r}.{nearest(key, known)}")
