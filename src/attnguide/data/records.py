"""The images of a data set, cut into parts: files, tables, tar files of WebDataset, data sets of Python."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import re
import tarfile
import tempfile
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from attnguide.data._addresses import file_system, is_remote, open_address, read_content
from attnguide.data.files import natural_key
from attnguide.data.images import IMAGE_SUFFIXES, LeftOut, walk_images
from attnguide.errors import AttnGuideError, DataError, InputError

__all__ = ["Records", "content_of", "open_records"]

#: Names of columns that hold images or their paths, the first that a table has counts.
_COLUMNS = ("image", "path", "file", "filename", "file_name", "bytes", "content", "jpg", "png", "url")
_KEYS = ("key", "__key__", "id")
_TABLES = (".csv", ".tsv")
_SUFFIXES = (*_TABLES, ".parquet", ".tar")
#: Between the file that holds an image and the image's name or number in it.
_IN = "::"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

#: What an image is called, and what it is: a path or address, the content of a file, or a number.
Record = tuple[str, str | bytes | int]


class Records(ABC):
    """The images of a data set, cut into parts whose images are determined by the part's number alone.

    Attributes:
        about: What determines the parts; JSON values.
        parts: Number of parts.
        total: Number of images; None if it is known after reading only.
        items: The data set that numbers stand for; None if there is none.
    """

    about: dict[str, Any]
    parts: int
    total: int | None = None
    items: Any = None

    @abstractmethod
    def part(self, number: int) -> Iterator[Record]:
        """Yield the images of a part, in order.

        Raises:
            DataError: If the file that holds them cannot be read.
        """

    def count(self, number: int) -> int | None:
        """Return the number of images in a part; None if it is known after reading only."""
        return None


class _Counted(Records):
    """Images whose number is known, and of which each part has as many, but the last."""

    def __init__(self, total: int, rows: int) -> None:
        self.total, self.rows = total, rows
        self.parts = -(-total // rows)

    def span(self, number: int) -> range:
        """Return the numbers of the images of a part."""
        return range(number * self.rows, min((number + 1) * self.rows, self.total or 0))

    def count(self, number: int) -> int:
        return len(self.span(number))


class Listed(_Counted):
    """Files by path or address; the list lies in a temporary file, so that it takes no memory."""

    def __init__(self, addresses: Iterable[str], rows: int) -> None:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (it is open as long as the object lives)
        weakref.finalize(self, self._file.close)
        self._starts, known, total, position = array("Q"), sha256(), 0, 0
        for address in addresses:
            if total % rows == 0:
                self._starts.append(position)
            line = json.dumps(address).encode() + b"\n"
            known.update(line)
            position += self._file.write(line)
            total += 1
        self._file.flush()
        super().__init__(total, rows)
        self.about = {"kind": "files", "images": total, "digest": known.hexdigest(), "rows": rows}

    def part(self, number: int) -> Iterator[Record]:
        start = self._starts[number]
        length = self._starts[number + 1] - start if number + 1 < len(self._starts) else -1
        self._file.seek(start)
        for line in self._file.read(length).splitlines():
            address = json.loads(line)
            yield address, address


class Items(_Counted):
    """A data set of Python, with `len` and indices."""

    def __init__(self, items: Any, rows: int) -> None:
        super().__init__(len(items), rows)
        self.items = items
        self.about = {"kind": type(items).__name__, "images": self.total, "rows": rows}

    def part(self, number: int) -> Iterator[Record]:
        return ((str(index), index) for index in self.span(number))


class Tables(_Counted):
    """Rows of Parquet files that hold encoded images, or paths."""

    def __init__(self, files: Sequence[str], rows: int) -> None:
        from attnguide.data.maps import arrow

        self._arrow, self._files = arrow(), list(files)
        self._counts: list[int] = []
        for file in files:
            with open_address(file) as opened, _reading(file):
                metadata = self._arrow.parquet.read_metadata(opened)
                self._counts.append(metadata.num_rows)
        super().__init__(sum(self._counts), rows)
        self.about = {"kind": "parquet", "files": [*zip(files, self._counts, strict=True)], "rows": rows}
        self.about = json.loads(json.dumps(self.about))

    def part(self, number: int) -> Iterator[Record]:
        span, first = self.span(number), 0
        for file, count in zip(self._files, self._counts, strict=True):
            wanted = range(max(span.start, first), min(span.stop, first + count))
            if wanted:
                yield from self._rows(file, range(wanted.start - first, wanted.stop - first))
            first += count

    def _rows(self, file: str, wanted: range) -> Iterator[Record]:
        with open_address(file) as opened, _reading(file):
            table = self._arrow.parquet.ParquetFile(opened)
            names = table.schema_arrow.names
            image, key = _column(names, file), next((name for name in _KEYS if name in names), None)
            first = 0
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                inside = range(max(wanted.start, first), min(wanted.stop, first + count))
                if inside:
                    columns = [image, *([key] if key else [])]
                    found = table.read_row_group(group, columns).slice(inside.start - first, len(inside))
                    for number, row in zip(inside, found.to_pylist(), strict=True):
                        yield _record(row[image], row[key] if key else None, f"{file}{_IN}{number}", file)
                first += count


class Tars(Records):
    """Tar files in the form of WebDataset: each is a part."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files, self.parts = list(files), len(files)
        self.about = {"kind": "tar", "files": self._files}

    def part(self, number: int) -> Iterator[Record]:
        file = self._files[number]
        with open_address(file) as opened, _reading(file), tarfile.open(fileobj=opened, mode="r|*") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    content = tar.extractfile(member)
                    if content is not None:
                        yield f"{file}{_IN}{member.name}", content.read()


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Turn errors of a damaged file into one that names it."""
    try:
        yield
    except AttnGuideError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OSError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}. Restore it, or leave it out.") from error


def _column(names: Sequence[str], file: str) -> str:
    """Name of the column with the images."""
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in _COLUMNS if name in lower), None)
    if found is None:
        raise DataError(
            f"{file} has the columns {', '.join(names)}, none of which is one of {', '.join(_COLUMNS)}. Name "
            "the column of the images 'path', or 'image' if it holds their content."
        )
    return found


def _record(value: Any, key: Any, place: str, file: str) -> Record:
    """Make a record of a cell: text is a path, bytes are an image, as is the pair of both."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        address = _beside(value, file)
        return str(address if key is None else key), address
    # Without an image there is a row all the same, with an error.
    return str(place if key is None else key), b"" if value is None else bytes(value)


def _beside(address: str, file: str) -> str:
    """Return an address in a table, which is relative to the table's folder."""
    if is_remote(address) or Path(address).is_absolute():
        return address
    if is_remote(file):
        return f"{file.rpartition('/')[0]}/{address}"
    return str(Path(file).parent / address)


# ------------------------------------------------------------------------ finding


def open_records(data: Any, rows: int = 4096) -> Records:
    """Find the images of a data set, and cut them into parts.

    Args:
        data: A folder, searched with its subfolders; an image file; a pattern such as `photos/*.jpg` or
            `train-{000..099}.tar`; a CSV file with a column `path`; a Parquet file with a column of paths or
            of encoded images; a tar file in the form of WebDataset; each also as an address such as
            `s3://bucket/photos`; a list of those; or any data set with `len` and indices, whose items are
            prepared images `(C, H, W)`, pictures, bytes or paths, alone, first in a tuple, or under `image`.
        rows: Number of images in a part; a tar file is always one.

    Returns:
        The images.

    Raises:
        InputError: If there are none, or kinds are mixed.
        DataError: If a table cannot be read.
    """
    if not isinstance(rows, int) or rows < 1:
        raise InputError(f"rows={rows!r} must be a whole number of at least 1.")
    named = isinstance(data, (str, os.PathLike)) or (
        isinstance(data, (list, tuple)) and all(isinstance(each, (str, os.PathLike)) for each in data)
    )
    if not named:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise InputError(
                f"data={data!r:.60} must be a path, an address, a list of them, or a data set with "
                "len() and indices."
            )
        records: Records = Items(data, rows)
    else:
        records = _of_files(
            [str(data)] if isinstance(data, (str, os.PathLike)) else list(map(str, data)), rows
        )
    if not records.parts or records.total == 0:
        raise InputError("data is empty: there are no images. Give files, folders, patterns or tables.")
    return records


def _of_files(arguments: Sequence[str], rows: int) -> Records:
    files = itertools.chain.from_iterable(map(_matches, arguments))
    first = next(files, None)
    files = files if first is None else itertools.chain([first], files)
    suffix = "" if first is None else Path(first).suffix.lower()
    if suffix not in _SUFFIXES:
        left_out = LeftOut()
        listed = Listed(_images(files, left_out), rows)
        if left_out:
            warnings.warn(f"{left_out}.", stacklevel=3)
        return listed
    tables = list(files)
    other = [file for file in tables if Path(file).suffix.lower() != suffix]
    if other:
        raise InputError(
            f"data mixes {first} and {other[0]}. Explain files of different kinds in runs of their own."
        )
    if suffix == ".tar":
        return Tars(tables)
    if suffix == ".parquet":
        return Tables(tables, rows)
    return Listed(itertools.chain.from_iterable(map(_paths_of_table, tables)), rows)


def _matches(argument: str) -> Iterator[str]:
    """Yield what a path, an address or a pattern names, in order."""
    if not argument or "\0" in argument:
        raise InputError(
            f"a path is {argument!r:.60}. Give a file, a folder or a pattern; '.' is this folder."
        )
    if braces := _BRACES.search(argument):
        width = len(braces[1])
        for number in range(int(braces[1]), int(braces[2]) + 1):
            yield from _matches(f"{argument[: braces.start()]}{number:0{width}}{argument[braces.end() :]}")
        return
    if is_remote(argument):
        if glob.has_magic(argument):
            system, path = file_system(argument)
            found = [system.unstrip_protocol(each) for each in sorted(system.glob(path))]
        else:
            found = [argument]
    else:
        exists = os.path.exists(argument)  # noqa: PTH110  (a name may be too long)
        found = [argument] if exists else sorted(glob.glob(argument, recursive=True), key=natural_key)  # noqa: PTH207
    if not found:
        what = "pattern matches nothing" if glob.has_magic(argument) else "path does not exist"
        raise InputError(f"{argument!r}: the {what}. Check the spelling.")
    yield from found


def _images(found: Iterable[str], left_out: LeftOut) -> Iterator[str]:
    """Yield image files, those of folders in order of their names, without a list of all."""
    for address in found:
        if is_remote(address):
            yield from _images_of_store(address)
        elif Path(address).is_dir():
            empty = True
            for file in walk_images(Path(address), left_out):
                empty = False
                yield str(file)
            if empty:
                raise InputError(
                    f"{address!r}: the folder holds no image{f' ({left_out})' if left_out else ''}. Check "
                    "the spelling; tar files and tables are given by pattern: 'folder/*.tar'."
                )
        else:
            yield address


def _images_of_store(address: str) -> Iterator[str]:
    system, path = file_system(address)
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        yield address
        return
    empty = True
    for folder, _, files in system.walk(path):
        for name in sorted(files):
            hidden = "/." in f"{folder}/{name}".removeprefix(path)
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not hidden:
                empty = False
                yield system.unstrip_protocol(f"{folder}/{name}")
    if empty:
        raise InputError(f"{address!r} holds no image. Check the address.")


def _paths_of_table(file: str) -> Iterator[str]:
    """Yield the paths of a CSV table, row by row."""
    with open_address(file) as opened, _reading(file):
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        delimiter = "\t" if file.lower().endswith(".tsv") else ","
        rows = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
        names = [name.strip() for name in next(rows, [])]
        column = names.index(_column(names, file))
        for row in rows:
            if row:
                if len(row) <= column:
                    raise DataError(
                        f"{file}, line {rows.line_num}, has no column {names[column]!r}. Correct it."
                    )
                yield _beside(row[column].strip(), file)


# ------------------------------------------------------------------------ reading


def content_of(key: str) -> bytes | Path:
    """Return the image that a key names: the path of a file, or the content of one.

    Raises:
        DataError: If there is none, as for items of a data set of Python.
    """
    file, found, inside = key.rpartition(_IN)
    if not found:
        return read_content(key)
    if Path(file).suffix.lower() == ".parquet" and inside.isdecimal():
        tables = Tables([file], 1)
        record = next(tables.part(int(inside)), None) if int(inside) < tables.parts else None
        if record is not None and isinstance(record[1], bytes):
            return record[1]
    elif Path(file).suffix.lower() == ".tar":
        for name, content in Tars([file]).part(0):
            if name == key and isinstance(content, bytes):
                return content
    raise DataError(f"{key} is not in {file}. Was the file changed?")
