"""Settings of a fine-tuning: arguments, or else what the recipe says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from attnguide import Recipe
from attnguide.errors import InputError
from attnguide.masks import Template, load_template
from attnguide.priors.mask import MaskPrior

__all__ = ["guide_arguments", "positive_number", "whole_number"]


def positive_number(name: str, argument: float | None, recipe: Recipe) -> Any:
    """Return an argument, or the recipe's value if it is None.

    Raises:
        InputError: If it is not a number above 0, or there is none.
    """
    value = recipe.train.get(name) if argument is None else argument
    where = f"{name}={value!r}" + (f" of recipe {recipe.name!r}" if argument is None else "")
    if value is None:
        raise InputError(f"recipe {recipe.name!r} has no {name} in [train]. Give {name}=.")
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{where} must be a number above 0.")
    return value


def whole_number(name: str, argument: int | None, recipe: Recipe) -> int:
    """Return an argument, or the recipe's value if it is None; see `positive_number`.

    Raises:
        InputError: If it is not a whole number above 0, or there is none.
    """
    value = positive_number(name, argument, recipe)
    if not isinstance(value, int):
        raise InputError(f"{name}={value!r} must be a whole number.")
    return value


def guide_arguments(
    recipe: Recipe,
    template: Tensor | Template | str | Path | None,
    classes: Sequence[str] | None,
    data: object,
    weight: float | None,
) -> dict[str, Any]:
    """Return the recipe's arguments of the guide, with the template as prior.

    Raises:
        InputError: If the names of the classes are missing, or the template has no region.
        DataError: If the template cannot be read.
        UnknownNameError: If a class of the template is unknown.
    """
    arguments = {"prior": "mask", **recipe.guide}
    if weight is not None:
        arguments["weight"] = weight
    if template is None:
        return arguments
    if isinstance(template, (str, Path)):
        classes = getattr(data, "classes", None) if classes is None else classes
        if classes is None:
            raise InputError(f"{template} can only be read with the names of the attributes. Give classes=.")
        template = load_template(template, classes)
    masks = template.masks if isinstance(template, Template) else template
    arguments["prior"] = MaskPrior(masks)
    if arguments.get("targets") == "all" and masks.ndim == 3 and bool(masks.isnan().all()):
        raise InputError("the template has no region: every class is NaN. Paint at least one.")
    return arguments
