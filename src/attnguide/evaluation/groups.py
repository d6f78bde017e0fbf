"""Reads which group each image belongs to, such as those with and without a shortcut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from attnguide.data.files import read_json, read_rows
from attnguide.data.images import IMAGE_SUFFIXES
from attnguide.errors import DataError, InputError

__all__ = ["read_groups"]


def read_groups(path: str | Path) -> dict[str, str]:
    """Read which group each image belongs to.

    A row of CSV holds the file, relative to the folder of the data, and its group (`cat/1.png,indoors`), and
    may be preceded by one row of headings. JSON maps files to groups.

    Args:
        path: A `.csv` or `.json` file.

    Returns:
        Groups by file, the parts of its path with `/` between them, in the order of the file.

    Raises:
        DataError: The file cannot be read, holds something else, or gives one image two groups.
        InputError: The suffix is another one.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".json":
            document = read_json(path)
            if not isinstance(document, Mapping):
                raise DataError(
                    f'{path} must map files to groups, such as {{"cat/1.png": "indoors"}}; got a '
                    f"{type(document).__name__}."
                )
            pairs: Iterable[tuple[str, object]] = document.items()
        case ".csv":
            pairs = _read_csv(path)
        case suffix:
            raise InputError(f"{path}: groups are a .csv or a .json file, not {suffix!r}.")
    groups: dict[str, str] = {}
    for file, group in pairs:
        if not isinstance(group, str | int) or not str(group).strip():
            raise DataError(f"{path}: the group of {file!r} must be a name, got {group!r:.60}.")
        # Windows separates folders by backslashes.
        name, group = PurePath(file.replace("\\", "/")).as_posix(), str(group).strip()
        if groups.setdefault(name, group) != group:
            raise DataError(
                f"{path} puts {file!r} into two groups, {groups[name]!r} and {group!r}. Keep one."
            )
    if not groups:
        raise DataError(f"{path} names no image. A row reads cat/1.png,indoors.")
    return groups


def _read_csv(path: Path) -> list[tuple[str, object]]:
    rows = read_rows(path)
    if rows and PurePath(rows[0][0]).suffix.lower() not in IMAGE_SUFFIXES:
        rows = rows[1:]  # the headings
    for row in rows:
        if len(row) != 2:
            raise DataError(f"{path}: the row {','.join(row)!r:.80} must hold a file and its group.")
    return [(file, group) for file, group in rows]
