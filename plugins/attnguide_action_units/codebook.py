"""The codebook: which action units make an expression, and where on the face each is seen.

The default codebook is `codebook.toml` in this package. Your own codebook is a file and needs no code:

```python
book = codebook.load("mine.toml")
prior = ActionUnitPrior(codebook=book)
```
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from attnguide.errors import DataError, UnknownNameError, nearest

__all__ = ["ActionUnit", "Codebook", "Region", "default", "load"]

#: Landmarks of the 300-W scheme.
_POINTS = 68


@dataclass(frozen=True)
class Region:
    """An ellipse that follows landmarks; lengths are in units of the distance between outer eye corners.

    Attributes:
        points: Landmarks that place it, 0 to 67.
        kind: `"at"`: centred on the mean of the landmarks; `"around"`: around the box that holds them.
        radii: Half axes along the eyes and across; around a box they are added to the half axes of the box.
        offset: Shift of the centre, along the eyes and towards the chin.
    """

    points: tuple[int, ...]
    kind: Literal["at", "around"]
    radii: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class ActionUnit:
    """An action unit of the Facial Action Coding System.

    Attributes:
        number: Number of the unit.
        name: Name of the unit.
        regions: Regions of the face that show the unit.
    """

    number: int
    name: str
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Codebook:
    """Expressions as sets of action units.

    Attributes:
        units: Action units by number.
        expressions: Numbers of the units of each expression; empty for an expression without a prior.
    """

    units: Mapping[int, ActionUnit]
    expressions: Mapping[str, tuple[int, ...]]

    def regions(self, numbers: Sequence[int]) -> tuple[Region, ...]:
        """Return the regions of units; a region that several units share is returned once.

        Raises:
            UnknownNameError: If a unit is unknown.
        """
        for number in numbers:
            if number not in self.units:
                raise UnknownNameError("action unit", str(number), map(str, self.units))
        regions = (region for number in numbers for region in self.units[number].regions)
        return tuple(dict.fromkeys(regions))

    def units_of(self, expression: str) -> tuple[int, ...]:
        """Return the numbers of an expression's units.

        Raises:
            UnknownNameError: If the expression is not in the codebook.
        """
        if expression not in self.expressions:
            raise UnknownNameError("expression", expression, self.expressions)
        return self.expressions[expression]


@cache
def default() -> Codebook:
    """Return the default codebook: six basic expressions, and neutral, which has no units."""
    return _parsed(files(__package__).joinpath("codebook.toml").read_text(encoding="utf-8"), "codebook.toml")


def load(path: str | Path) -> Codebook:
    """Read a codebook.

    Args:
        path: A TOML file with `[expressions]` and `[[unit]]`; the default codebook shows the format.

    Returns:
        The codebook.

    Raises:
        DataError: If the file cannot be read, or an entry is wrong or missing; the message names it.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a codebook: {error}") from error
    return _parsed(text, str(path))


def _parsed(text: str, where: str) -> Codebook:
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as a codebook: {error}") from error
    _check_keys(where, content, ("expressions", "unit"))
    entries = content.get("unit")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where} describes no action unit; add [[unit]] with number, name and regions.")
    units: dict[int, ActionUnit] = {}
    for place, entry in enumerate(entries, start=1):
        unit = _unit(f"{where}, unit {place}", entry)
        if unit.number in units:
            raise DataError(
                f"{where}, unit {place}: number {unit.number} is taken; each unit needs its own number."
            )
        units[unit.number] = unit
    expressions = content.get("expressions")
    if not isinstance(expressions, dict) or not expressions:
        raise DataError(f"{where} has no expressions; add [expressions], for example happiness = [6, 12].")
    for name, numbers in expressions.items():
        if not isinstance(numbers, list):
            raise DataError(f"{where}, expression {name!r}: {numbers!r} must be a list of unit numbers.")
        for number in numbers:
            if type(number) is not int or number not in units:
                raise DataError(
                    f"{where}, expression {name!r}: action unit {number!r} is not described."
                    f"{nearest(str(number), map(str, units))}"
                )
    return Codebook(units, {name: tuple(numbers) for name, numbers in expressions.items()})


def _unit(where: str, entry: Any) -> ActionUnit:
    _check_keys(where, entry, ("number", "name", "regions"))
    number, name, regions = entry.get("number"), entry.get("name"), entry.get("regions")
    if type(number) is not int or number < 1:
        raise DataError(f"{where}: number = {number!r} must be the unit's number, for example 12.")
    where = f"{where} (AU{number})"
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: name = {name!r} must be a text.")
    if not isinstance(regions, list) or not regions:
        raise DataError(f"{where}: regions = {regions!r} must be a list of at least one.")
    return ActionUnit(number, name, tuple(_region(where, region) for region in regions))


def _region(where: str, entry: Any) -> Region:
    _check_keys(where, entry, ("at", "around", "radii", "offset"))
    if ("at" in entry) == ("around" in entry):
        raise DataError(f"{where}: a region has either at = […] or around = […], got {entry!r}.")
    kind: Literal["at", "around"] = "at" if "at" in entry else "around"
    points = entry[kind]
    if not isinstance(points, list) or not points or any(type(point) is not int for point in points):
        raise DataError(f"{where}: {kind} = {points!r} must be a list of landmarks.")
    outside = [point for point in points if not 0 <= point < _POINTS]
    if outside:
        raise DataError(f"{where}: there is no landmark {outside[0]}; they run from 0 to {_POINTS - 1}.")
    radii = _two(where, "radii", entry.get("radii"))
    if min(radii) <= 0:
        raise DataError(f"{where}: radii = {list(radii)} must be positive.")
    return Region(tuple(points), kind, radii, _two(where, "offset", entry.get("offset", [0.0, 0.0])))


def _two(where: str, key: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or [
        type(part) in (int, float) and math.isfinite(part) for part in value
    ] != [True, True]:
        raise DataError(f"{where}: {key} = {value!r} must be two numbers, along the eyes and across.")
    return float(value[0]), float(value[1])


def _check_keys(where: str, entry: Any, known: Sequence[str]) -> None:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: {entry!r} must be a table.")
    for key in entry:
        if key not in known:
            raise DataError(f"{where} has an unknown entry {key!r}.{nearest(key, known)}")
