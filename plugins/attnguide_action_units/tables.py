"""Tables of landmarks by the name of the image, in common file formats."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnguide.data.files import atomic_write, check_file, natural_key, read_json, read_rows, read_text
from attnguide.errors import DataError, InputError
from attnguide_action_units.landmarks import to_68

__all__ = ["LandmarkTable", "read_landmarks"]

#: Names of the arrays of landmarks, and of image names, in an .npz file.
_ARRAYS, _NAMES = ("landmarks68", "landmarks", "points", "lmk"), ("files", "names", "images", "paths")
_COLUMN = re.compile(r"(?:landmark|point|lm)?_?([xy])_?(\d{1,4})")
#: Names of the column of image names.
_NAME_COLUMNS = ("file", "filename", "name", "image", "path")
_PTS = re.compile(r"n_points\s*:\s*(\d{1,4})\s*\{([^}]*)\}")


@dataclass(frozen=True)
class LandmarkTable:
    """Landmarks of N images.

    Attributes:
        names: Names of the images as they were written, or empty.
        points: Landmarks `(N, 68, 2)` float32, x and y in pixels; NaN for an image without landmarks.
    """

    names: tuple[str, ...]
    points: Tensor

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        indices: dict[str, int] = {}
        for index, name in enumerate(self.names):
            for key in _endings(name):
                indices[key] = -1 if key in indices and indices[key] != index else index
        return indices

    def of(self, name: str | Path) -> Tensor | None:
        """Return an image's landmarks `(68, 2)`; None if the table has none for it.

        Args:
            name: A path, a file name, or one without suffix.

        Raises:
            DataError: If several entries match.
        """
        for key in _endings(name):
            index = self._by_name.get(key)
            if index is None:
                continue
            if index < 0:
                raise DataError(f"several entries of the table of landmarks match {key!r}; use whole paths.")
            points = self.points[index]
            return None if bool(points.isnan().all()) else points
        return None

    def save(self, path: str | Path) -> Path:
        """Write an .npz file with `files` and `landmarks68`, completely or not at all."""
        path = Path(path)
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez_compressed(file, files=np.array(self.names), landmarks68=self.points.numpy())
        return path


def _endings(name: str | Path) -> list[str]:
    """Return the path and its last parts, longest first, with and without suffix: folders may have moved."""
    path = PurePath(str(name).replace("\\", "/"))  # Windows separates folders by backslashes
    whole = [PurePath(*path.parts[start:]) for start in range(len(path.parts))]
    return list(dict.fromkeys(str(part) for ending in whole for part in (ending, ending.with_suffix(""))))


def read_landmarks(path: str | Path) -> LandmarkTable:
    """Read landmarks of many images, or of one.

    Args:
        path: One of

            - `.npz`: an array `landmarks68` (or `landmarks`, `points`), and `files` (or `names`)
            - `.npy`: an array `(N, P, 2)`
            - `.csv`: a line for each image: its name, then x0, y0, x1, y1, …; a header may change the order
              (`x_0 … x_67, y_0 … y_67`, as OpenFace writes it)
            - `.json`: `{"name": [[x, y], …], …}`
            - `.pts`: one image, as in 300-W, whose pixels count from 1; or a folder of such files

            with 68 points, or in a scheme that [`to_68`][attnguide_action_units.landmarks.to_68] knows.

    Returns:
        The table.

    Raises:
        DataError: If the file cannot be read, or does not hold landmarks.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.pts"), key=natural_key)
        if not files:
            raise DataError(
                f"{path} holds no .pts file; give a file of landmarks, or a folder of .pts files."
            )
        stems = tuple(str(file.relative_to(path).with_suffix("")) for file in files)
        return LandmarkTable(stems, torch.stack([_read_pts(file) for file in files]))
    readers = {".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() == ".pts":
        return LandmarkTable((path.stem,), _read_pts(path)[None])
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path} is not a known table of landmarks; give one of {', '.join(readers)}, .pts, or a "
            "folder of .pts files."
        )
    names, points = readers[path.suffix.lower()](check_file(path))
    points = _as_68(path, points)
    if points.ndim != 3:
        raise DataError(f"{path}: landmarks have shape {tuple(points.shape)}, not (N, 68, 2).")
    if names and len(names) != len(points):
        raise DataError(f"{path} names {len(names)} images, but has landmarks of {len(points)}.")
    return LandmarkTable(tuple(names), points)


def _as_68(path: Path, points: Any) -> Tensor:
    try:
        return to_68(points)
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def _read_npz(path: Path) -> tuple[Sequence[str], Any]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} cannot be read as .npz: it is not an archive.")
    try:
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in (*_ARRAYS, *_NAMES)}
            there = archive.files
    # A damaged file can make numpy fail in many ways: BadZipFile, zlib.error, tokenize.TokenError, …
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    key = next((name for name in _ARRAYS if name in arrays), None)
    if key is None:
        raise DataError(f"{path} has no array {' or '.join(_ARRAYS)}; it has {', '.join(there) or 'none'}.")
    names = next((arrays[name] for name in _NAMES if name in arrays), np.array([]))
    texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
    return texts, arrays[key]


def _read_npy(path: Path) -> tuple[Sequence[str], Any]:
    try:
        with path.open("rb") as file:
            return (), np.load(file, allow_pickle=False)
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error


def _read_json(path: Path) -> tuple[Sequence[str], Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path} must be an object {{"name": [[x, y], …], …}}.')
    rows = []
    for name, points in content.items():
        try:
            rows.append(None if points is None else np.array(points, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, {name!r}: {points!r:.80} are not landmarks: {error}") from error
    return list(content), _stacked(path, list(content), rows)


def _read_csv(path: Path) -> tuple[Sequence[str], Any]:
    lines = read_rows(path)
    if not lines:
        raise DataError(f"{path} has no landmarks.")
    cells = lines[0]
    # OpenFace writes pixels as x_0 and millimetres as X_0: capitals count only where there is nothing else.
    header = [_COLUMN.fullmatch(cell) for cell in cells]
    if not any(header):
        header = [_COLUMN.fullmatch(cell.lower()) for cell in cells]
    at_name: int | None
    if any(header):
        columns = {(match[1].lower(), int(match[2])): at for at, match in enumerate(header) if match}
        numbers = sorted({number for _, number in columns})
        try:
            order = [columns[axis, number] for number in numbers for axis in "xy"]
        except KeyError as error:
            axis, number = error.args[0]
            raise DataError(f"{path} has no column {axis}{number}; each point has an x and a y.") from None
        lines = lines[1:]
        others = [at for at in range(len(cells)) if at not in order]
        called = [at for at in others if cells[at].lower() in _NAME_COLUMNS]
        texts = [at for at in others if lines and at < len(lines[0]) and not _is_number(lines[0][at])]
        at_name = next(iter([*called, *texts, *(at for at in others if at == 0)]), None)
    else:
        at_name = 0 if len(lines[0]) % 2 == 1 else None
        order = list(range(len(lines[0]) % 2, len(lines[0])))
    names, rows = [], []
    for number, line in enumerate(lines, start=1):
        try:
            names += [] if at_name is None else [line[at_name]]
            values = [float(line[at] or "nan") for at in order]
        except (IndexError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error}; expected {len(order)} numbers.") from error
        rows.append(np.array(values, dtype=np.float32).reshape(-1, 2))
    return names, _stacked(path, names, rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _stacked(path: Path, names: Sequence[str], rows: Sequence[Any]) -> Any:
    shape = next((row.shape for row in rows if row is not None), None)
    if shape is None:
        raise DataError(f"{path} has no landmarks.")
    for index, row in enumerate(rows):
        if row is not None and row.shape != shape:
            which = repr(names[index]) if names else f"entry {index}"
            raise DataError(f"{path}, {which} has landmarks {row.shape}, others {shape}.")
    return np.stack([np.full(shape, np.nan, np.float32) if row is None else row for row in rows])


def _read_pts(path: Path) -> Tensor:
    found = _PTS.search(read_text(path))
    if found is None:
        raise DataError(f"{path} is not a file of landmarks: n_points and {{ … }} are missing.")
    try:
        points = np.array(list(_pairs(found[2])), dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if len(points) != int(found[1]):
        raise DataError(f"{path} announces {found[1]} points, and has {len(points)}.")
    return _as_68(path, points - 1)


def _pairs(text: str) -> Iterator[tuple[float, float]]:
    for line in text.split("\n"):
        if line.strip():
            x, y = line.split()
            yield float(x), float(y)
