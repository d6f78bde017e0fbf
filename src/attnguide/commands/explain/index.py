"""The list of the files that a run has written, from which a later run continues."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnguide.data.files import atomic_write, read_json
from attnguide.errors import DataError, InputError

__all__ = ["Index", "check_writable", "writing"]

#: Largest share of a run's time that goes into writing the index, which is written as a whole each time.
_SHARE = 0.05


def check_writable(folder: Path) -> None:
    """Make a folder and try to write to it.

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


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all, and create its folder if it is missing; yields a temporary path.

    Raises:
        InputError: If that fails, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Make room, or choose another --out."
        ) from error


class Index:
    """`index.jsonl`, with a line for each map, and `settings.json`, the settings of the run.

    The file on disk is always complete: it is replaced as a whole, and lists only files that exist.

    Args:
        folder: The output folder.
        settings: Settings that determine the results; JSON values.
        resume: Continue the run that the folder holds. Otherwise its index is replaced at `begin`.

    Raises:
        InputError: If a run with other settings is to be resumed.
        DataError: If the files of an earlier run cannot be read.

    Attributes:
        lines: A line for each map that has been written, in order.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.path, self._settings_path = folder / "index.jsonl", folder / "settings.json"
        self._settings = json.loads(json.dumps(settings))
        self.lines: list[dict[str, Any]] = []
        self._written, self._cost = 0.0, 0.0
        if resume and self.path.exists():
            self._read()

    def _read(self) -> None:
        for number, text in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                image, name, files = (
                    str(line["image"]),
                    str(line["name"]),
                    [str(file) for file in line["files"]],
                )
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{self.path}, line {number}, was not written by attnguide: {error!r}. Leave out "
                    "--resume to start again."
                ) from error
            self.lines.append({**line, "image": image, "name": name, "files": files})
        if not self.lines:
            return
        before = read_json(self._settings_path)
        before = before if isinstance(before, dict) else {}
        other = [
            key for key in sorted({*before, *self._settings}) if before.get(key) != self._settings.get(key)
        ]
        if other:
            listed = ", ".join(
                f"{key} was {before.get(key)!r} and is {self._settings.get(key)!r}" for key in other
            )
            raise InputError(
                f"{self.folder} holds a run with other settings: {listed}. Give the same, or another folder, "
                "or leave out --resume to start again."
            )
        gone = {
            line["image"]
            for line in self.lines
            if not all((self.folder / f).is_file() for f in line["files"])
        }
        self.lines = [line for line in self.lines if line["image"] not in gone]

    @property
    def names(self) -> dict[str, str]:
        """Name of each image that is complete, by absolute path."""
        return {os.path.abspath(line["image"]): line["name"] for line in self.lines}  # noqa: PTH100

    def begin(self) -> None:
        """Write the index and the settings; from here on the folder belongs to this run."""
        # In this order: an interruption must never leave old lines with new settings.
        self.write()
        with writing(self._settings_path) as temporary:
            temporary.write_text(json.dumps(self._settings, indent=2) + "\n")

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines for complete files, and write the index if it was last written long enough ago."""
        self.lines.extend(lines)
        if time.monotonic() - self._written > self._cost / _SHARE:
            self.write()

    def write(self) -> None:
        """Replace the index on disk."""
        start = time.monotonic()
        with writing(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        self._written = time.monotonic()
        self._cost = self._written - start
