"""The list of the files that a run has written, from which a later run continues."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from attnguide.commands.explain.reserving import SCRATCH
from attnguide.data.files import atomic_write, read_json
from attnguide.errors import DataError, InputError

__all__ = ["SUFFIXES", "Index", "writing"]

#: Suffixes of the files of maps.
SUFFIXES = (".png", ".npz", ".npy")

#: Largest share of a run's time that goes into writing the index, which is written as a whole each time.
_SHARE = 0.05
#: What the contact sheet writes below a map whose line lacks it.
_CAPTION = {"class_name": "", "score": 0.0}


@contextmanager
def writing(folder: Path, file: str) -> Iterator[Path]:
    """Write a file of the output folder completely or not at all; yields a temporary path.

    Folders of the file are made if they are missing. The temporary file is in `SCRATCH`, which the next run
    clears, whatever ended this one.

    Args:
        folder: The output folder.
        file: The file, relative to the folder.

    Raises:
        InputError: If that fails, for example because the disk is full.
    """
    path, scratch = folder / file, folder / SCRATCH
    try:
        for needed in (path.parent, scratch):
            needed.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, scratch) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Make room, or choose another --out."
        ) from error


class Index:
    """`index.jsonl`, with a line for each map, and `settings.json`, the settings of the run.

    The file on disk is always complete: it is replaced as a whole, and lists an image once all of its maps
    exist.

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
        try:
            texts = self.path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read: {error.strerror}. Leave out --resume to start again."
            ) from error
        for number, text in enumerate(texts, 1):
            try:
                self.lines.append(_checked(json.loads(text)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{self.path}, line {number}, was not written by attnguide: {error!r}. Leave out "
                    "--resume to start again."
                ) from error
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
        counts = Counter(line["image"] for line in self.lines)
        gone = {
            line["image"]
            for line in self.lines
            if line.get("maps", counts[line["image"]]) != counts[line["image"]]
            or not all((self.folder / file).is_file() for file in line["files"])
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
        with writing(self.folder, self._settings_path.name) as temporary:
            temporary.write_text(json.dumps(self._settings, indent=2) + "\n")

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add lines, and write the index if it was last written long enough ago.

        Args:
            lines: All lines of an image, or of several; their files are complete.
        """
        # Each line has the number of the image's maps, so that an image that lacks some is known.
        counts = Counter(line["image"] for line in lines)
        self.lines += [{**line, "maps": counts[line["image"]]} for line in lines]
        if time.monotonic() - self._written > self._cost / _SHARE:
            self.write()

    def write(self) -> None:
        """Replace the index on disk."""
        start = time.monotonic()
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        with writing(self.folder, self.path.name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._written = time.monotonic()
        self._cost = self._written - start


def _checked(written: Any) -> dict[str, Any]:
    """Return a line if later steps can rely on it; raises `ValueError`, `KeyError` or `TypeError` if not."""
    line: dict[str, Any] = {**_CAPTION, **written}
    for key in ("image", "name", "class_name"):
        if not isinstance(line[key], str):
            raise TypeError(f"{key} is {line[key]!r}")
    if not math.isfinite(line["score"]):
        raise ValueError(f"score is {line['score']}")
    if not isinstance(line["files"], list) or not line["files"]:
        raise TypeError(f"files is {line['files']!r}")
    for file in map(PurePath, line["files"]):
        # Nothing outside the folder is read, whatever the line says.
        if file.is_absolute() or ".." in file.parts or file.suffix not in SUFFIXES:
            raise ValueError(f"{str(file)!r} is not a map")
    return line
