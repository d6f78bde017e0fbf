"""Legends: the class of each value or colour of a painted template."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnguide.data.files import read_json, read_text
from attnguide.errors import DataError, InputError

__all__ = ["LegendEntry", "find_legend", "legend_among", "legend_of", "read_legend"]

_SUFFIXES = (".json", ".csv", ".toml")
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_INDEX = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True)
class LegendEntry:
    """One value of a template and the classes whose region it marks.

    Attributes:
        key: The value as the legend writes it.
        is_color: Whether it is a colour; otherwise it is a palette index or a grey value.
        value: The index, or the colour as 0xRRGGBB.
        classes: Names of the classes; none for background.
    """

    key: str
    is_color: bool
    value: int
    classes: tuple[str, ...]


def find_legend(template: Path) -> Path:
    """Find the legend that lies next to a template: under the template's name, else under `legend`.

    Raises:
        DataError: There is none, or more than one.
    """
    legend = legend_of(template)
    if legend is not None:
        return legend
    raise DataError(
        f"{template} has no legend. Write {template.with_suffix('.json')}, which maps its values to "
        'classes: {"1": "class a", "2": ["class b", "class c"]}, or "#rrggbb" for colours. Or give a folder '
        "with one image for each class."
    )


def legend_of(template: Path) -> Path | None:
    """Find the legend next to a template, as `find_legend`; None without one."""
    return legend_among(template.parent, template.stem) or legend_among(template.parent, "legend")


def legend_among(folder: Path, stem: str) -> Path | None:
    """Find the legend of that name in a folder; None without one.

    Raises:
        DataError: There is more than one.
    """
    legends = [path for suffix in _SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(legends) > 1:
        raise DataError(
            f"{folder} has {len(legends)} legends for one purpose: {', '.join(map(str, legends))}. Keep one."
        )
    return legends[0] if legends else None


def read_legend(path: str | Path) -> list[LegendEntry]:
    """Read a legend.

    JSON and TOML map a key to a class name or a list of them; a CSV row holds the key and then the names, and
    may be preceded by one row of headings. A key is a whole number, the palette index or grey value, or a
    colour `#rrggbb`.

    Args:
        path: A `.json`, `.csv` or `.toml` file.

    Returns:
        The entries, in the order of the file.

    Raises:
        DataError: The file cannot be read, has a key or a value of another kind, or is empty.
        InputError: The suffix is another one.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".json":
            pairs = _pairs(read_json(path), path)
        case ".toml":
            pairs = _pairs(_read_toml(path), path)
        case ".csv":
            pairs = _read_csv(path)
        case suffix:
            raise InputError(f"{path}: a legend is one of {', '.join(_SUFFIXES)}, not {suffix!r}.")
    entries = [_entry(key, names, path) for key, names in pairs]
    if not entries:
        raise DataError(f'{path} is a legend without entries. Add some, such as "1": "class a".')
    return entries


def _pairs(document: object, path: Path) -> list[tuple[str, object]]:
    if not isinstance(document, Mapping):
        raise DataError(f"{path} must map values to class names, got a {type(document).__name__}.")
    return list(document.items())


def _read_toml(path: Path) -> dict[str, object]:
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path} is not valid TOML: {error}. An entry reads 1 = "class a".') from error


def _read_csv(path: Path) -> list[tuple[str, object]]:
    try:
        rows = [row for row in csv.reader(read_text(path).splitlines(), skipinitialspace=True) if any(row)]
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}. A row reads 1,class a.") from error
    if rows and not _is_key(rows[0][0]):
        rows = rows[1:]  # the headings
    return [(row[0], [name for name in row[1:] if name]) for row in rows]


def _is_key(text: str) -> bool:
    return bool(_COLOR.fullmatch(text.strip()) or _INDEX.fullmatch(text.strip()))


def _entry(key: str, names: object, path: Path) -> LegendEntry:
    if not _is_key(key):
        raise DataError(f"{path}: {key!r} is neither a whole number up to 65535 nor a colour #rrggbb.")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: {key!r} must name a class or a list of classes, got {names!r:.60}.")
    key = key.strip()
    is_color = key.startswith("#")
    return LegendEntry(key, is_color, int(key[1:], 16) if is_color else int(key), tuple(names))
