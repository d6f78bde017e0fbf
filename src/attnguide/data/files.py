"""Reads and writes files so that a failure leaves no broken file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnguide.errors import DataError, InputError

__all__ = [
    "atomic_write",
    "check_file",
    "check_target",
    "check_writable",
    "natural_key",
    "read_json",
    "read_rows",
    "read_text",
]


@contextmanager
def atomic_write(path: str | Path, scratch: Path | None = None, *, label: str = "") -> Iterator[Path]:
    """Write a file completely or not at all.

    The block writes to a temporary file with the suffix of `path`. When the block ends, that file replaces
    `path` in one step; when the block raises anything, the temporary file is removed and `path` stays as it
    was.

    Args:
        path: The file to write. It may exist; its folder must.
        scratch: Folder of the temporary file, on the same file system; by default the folder of `path`.
        label: Part of the temporary name, by which whoever goes on knows what a killed process left.

    Yields:
        The temporary path to write to.

    Raises:
        InputError: The folder is missing or cannot be written to, or `path` is not a regular file.
    """
    path = _target(path)
    # Not by `tempfile`, whose files only their owner may read.
    temporary = (scratch or path.parent) / f".attnguide-{label}{secrets.token_hex(8)}{path.suffix}"
    try:
        try:
            temporary.open("xb").close()
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}. Choose a folder that you may write to."
            ) from error
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush_to_disk(path: Path) -> None:
    """Write the content to the disk, so that no power failure leaves the new name without it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_target(path: str | Path) -> Path:
    """Return `path` if a file can be written there; for a check before long work begins.

    Raises:
        InputError: The folder is missing or cannot be written to, or `path` is not a regular file.
    """
    path = _target(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}. Choose a folder that you may write to."
        ) from error
    return path


def _target(path: str | Path) -> Path:
    """Return `path` if nothing stands where the file is to be written."""
    path = _path(path)
    try:
        # A folder cannot be replaced by a file, and replacing a device such as /dev/null would destroy it.
        occupied, has_folder = path.exists() and not path.is_file(), path.parent.is_dir()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another name.") from error
    if occupied:
        raise InputError(f"cannot write {path}: it is not a regular file. Give the name of a file.")
    if not has_folder:
        raise InputError(f"cannot write {path}: there is no folder {path.parent}. Create it first.")
    return path


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or (isinstance(path, str) and (not path or "\0" in path)):
        raise InputError(f"path={path!r:.60} must be text that is not empty, or a pathlib.Path.")
    return Path(path)


def check_writable(folder: Path) -> None:
    """Make a folder and try to write to it; for a check before long work begins.

    Raises:
        InputError: If that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {folder}: {error.strerror}. Choose another with --out."
        ) from error


def check_file(path: str | Path) -> Path:
    """Return `path` if it is a regular file that is not empty.

    Pipes and devices are refused, since reading them might never end.

    Raises:
        DataError: It is missing, a folder, empty, or not a regular file.
        InputError: `path` is neither text nor a path, or empty text.
    """
    path = _path(path)
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder. Give the name of a file.")
        if not path.exists():
            raise DataError(f"{path} does not exist. Check the path.")
        if not path.is_file():
            raise DataError(f"{path} is not a regular file. Copy its content to a file and give that.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes). Restore the file, or remove it.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    return path


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        DataError: The file cannot be read, is empty, or is not UTF-8.
    """
    path = check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def read_json(path: str | Path) -> object:
    """Read a JSON file.

    Raises:
        DataError: The file cannot be read, is not JSON, or gives one key of an object twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} occurs twice in one object")
        return entry

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    # Nesting too deep is a RecursionError, and an integer of thousands of digits a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. Correct it, or export it again.") from error


def read_rows(path: str | Path) -> list[list[str]]:
    """Read a table as spreadsheets write it: UTF-8 with commas, or with semicolons or tabs.

    Returns:
        The cells of each row that is not blank, without spaces around them.

    Raises:
        DataError: The file cannot be read, is empty, or is not such a table.
    """
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((each for each in ",;\t" if each in first), ",")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise DataError(
            f"{path} is not a table of comma-separated values: {error}. Export it again."
        ) from error
    return [cells for row in rows if any(cells := [cell.strip() for cell in row])]


def natural_key(text: str | Path) -> tuple[object, ...]:
    """Return a sorting key by which `2.png` comes before `10.png`, and a folder's files stay together."""
    parts = Path(text).parts
    # Splitting by digits puts text at even places and numbers at odd ones, so both can be compared.
    chunks = [re.split(r"(\d+)", part.casefold()) for part in parts]
    return [[int(c) if i % 2 else c for i, c in enumerate(part)] for part in chunks], parts
