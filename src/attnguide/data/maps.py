"""Maps of many images in Parquet files: their table, the files that hold its parts, and reading back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnguide.data._addresses import Place
from attnguide.data._where import condition
from attnguide.errors import DataError, InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

__all__ = ["MapRow", "Maps", "map_table", "read_maps", "writing_part"]

#: Name of the file with the settings of a run.
SETTINGS = "settings.json"
#: Key of the settings in the metadata of a part.
_KEY = b"attnguide"
#: Rows are written to disk in groups of about so many.
_GROUP = 16_384
#: Level of zstd: a higher one takes longer, and saves nothing.
_LEVEL = 9
#: Splitting the bytes of maps as well would save 2 to 4 %, but DuckDB does not read that of float16.
_ENCODINGS = {
    "key": "DELTA_BYTE_ARRAY",
    "score": "BYTE_STREAM_SPLIT",
    "logit": "BYTE_STREAM_SPLIT",
}
#: The largest values of a map between which float16 keeps its whole precision for what matters of the map.
_LEAST, _MOST = 2.0**-6, 2.0**15


def arrow() -> Any:
    """Import pyarrow with its Parquet reader.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'attnguide[parquet]'") from error
    return pyarrow


def _schema() -> pa.Schema:
    pa = arrow()
    fields = {
        "key": pa.string(),
        "class": pa.string(),
        "index": pa.int32(),
        "score": pa.float32(),
        "logit": pa.float32(),
        "layer": pa.string(),
        "h": pa.int32(),
        "w": pa.int32(),
        "scale": pa.float32(),
        "map": pa.list_(pa.float16()),
        "error": pa.string(),
    }
    return pa.schema(list(fields.items()))


def map_table(
    keys: Sequence[str],
    maps: npt.NDArray[np.float32],
    classes: npt.NDArray[np.int64],
    logits: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    *,
    names: Sequence[str] | None = None,
    layer: str = "",
    errors: Mapping[int, str] | None = None,
) -> pa.Table:
    """Make a table with a row for each map, image by image.

    Args:
        keys: What each image is called: its path, or where it lies.
        maps: `(B, T, h, w)`.
        classes: Class of each map, `(B, T)`; −1 where an image has fewer than T.
        logits: Logit of each map's class, `(B, T)`.
        scores: Probability of each map's class, `(B, T)`.
        names: Name of each class; by default its number.
        layer: The layer that was looked at.
        errors: Why images have no map, by their number. They get one row, without a class.

    Returns:
        Columns `key`, `class` (name), `index` (of the class), `score`, `logit`, `layer`, `h`, `w`, `scale`,
        `map` (row by row, float16; times `scale`, which is 1 for maps whose largest value is neither tiny nor
        huge) and `error`.
    """
    pa = arrow()
    failed = dict(errors or {})
    for number in range(len(keys)):
        if number not in failed and not (classes[number] >= 0).any():
            failed[number] = "no class was to be explained"
    wanted = classes >= 0
    wanted[list(failed)] = False
    image, slot = wanted.nonzero()
    values = maps[image, slot].astype(np.float32).reshape(len(image), -1)
    largest = np.abs(values).max(axis=1, initial=0)
    plain = (largest == 0) | ((largest >= _LEAST) & (largest <= _MOST))
    scale = np.where(plain, 1, 2.0 ** np.floor(np.log2(np.where(plain, 1, largest)))).astype(np.float32)
    halves = (values / scale[:, None]).astype(np.float16)
    height, width = maps.shape[-2:]
    index = classes[image, slot]
    columns = [
        _texts([keys[each] for each in image.tolist()]),
        _texts([str(cls) if names is None else names[cls] for cls in index.tolist()]),
        _column(index.astype(np.int32), pa.int32()),
        _column(scores[image, slot].astype(np.float32), pa.float32()),
        _column(logits[image, slot].astype(np.float32), pa.float32()),
        _texts([layer] * len(image)),
        _column(np.full(len(image), height, np.int32), pa.int32()),
        _column(np.full(len(image), width, np.int32), pa.int32()),
        _column(scale, pa.float32()),
        pa.ListArray.from_arrays(
            _column(np.arange(len(image) + 1, dtype=np.int32) * (height * width), pa.int32()),
            _column(halves.ravel(), pa.float16()),
        ),
        pa.nulls(len(image), pa.string()),
    ]
    table = pa.table(columns, schema=_schema())
    if not failed:
        return table
    without = error_table([keys[each] for each in failed], list(failed.values()))
    order = np.argsort(np.concatenate([image, np.array(list(failed), dtype=image.dtype)]), kind="stable")
    return pa.concat_tables([table, without]).take(_column(order.astype(np.int64), pa.int64()))


def _column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Make a column of numbers; unlike `pyarrow.array` it does not import pandas, which takes a while."""
    pa = arrow()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _texts(values: Sequence[str]) -> pa.Array:
    """Make a column of texts; likewise. What is not Unicode, as a file may be called, is escaped."""
    pa = arrow()
    encoded = [value.encode(errors="backslashreplace") for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def error_table(keys: Sequence[str], reasons: Sequence[str]) -> pa.Table:
    """Make a table with a row for each image that could not be explained."""
    pa = arrow()
    given = {"key": _texts(keys), "error": _texts(reasons)}
    schema = _schema()
    columns = [given.get(field.name, pa.nulls(len(keys), field.type)) for field in schema]
    return pa.table(columns, schema=schema)


# ------------------------------------------------------------------------- parts


def part_name(number: int) -> str:
    """Name of the file of a part."""
    return f"part-{number:06}.parquet"


def part_number(name: str) -> int | None:
    """Number of the part that a file is; None if it is none."""
    match = re.fullmatch(r"part-(\d{6,12})\.parquet", name)
    return None if match is None else int(match[1])


def digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings, which are JSON values."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing_part(
    place: Place, number: int, settings: Mapping[str, Any]
) -> Iterator[Callable[[pa.Table], None]]:
    """Write one part completely or not at all: at the end of the block, if nothing was raised in it.

    Args:
        place: The folder.
        number: Number of the part.
        settings: What determines its rows; JSON values.

    Yields:
        A function that adds rows.

    Raises:
        InputError: If it cannot be written, for example because the disk is full.
    """
    pa = arrow()
    text = json.dumps({"hash": digest(settings), "settings": settings}, sort_keys=True)
    schema = _schema().with_metadata({_KEY: text})
    waiting: list[Any] = []
    rows = 0
    with place.writing(part_name(number)) as path:
        writer = pa.parquet.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=_LEVEL,
            # Names and settings repeat; keys begin alike; of numbers the byte with the exponent repeats.
            use_dictionary=["class", "index", "layer", "h", "w", "scale", "error"],
            column_encoding=_ENCODINGS,
            write_statistics=["key", "class", "index", "score", "logit"],
        )

        def write(table: Any) -> None:
            nonlocal rows
            waiting.append(_packed(table))
            rows += len(table)
            if rows >= _GROUP:
                flush()

        def flush() -> None:
            nonlocal rows
            if waiting:
                tables = [pa.ipc.open_stream(packed).read_all() for packed in waiting]
                writer.write_table(pa.concat_tables(tables).cast(schema))
                waiting.clear()
                rows = 0

        try:
            yield write
            flush()
            writer.close()
        except BaseException:
            with suppress(OSError):  # it is thrown away; what happened first is what counts
                writer.close()
            raise


def _packed(table: pa.Table) -> pa.Buffer:
    """Copy a table into one piece of Arrow's own memory.

    Rows wait for others. The many small pieces of a table would lie on the heap between the images of
    batches, which then could not be put where earlier ones were: memory would grow by a batch with each.
    """
    pa = arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def part_settings(place: Place, name: str) -> dict[str, Any] | None:
    """Return the settings that a part was made with; None if the file is not a whole Parquet file.

    Raises:
        DataError: If it is one, but was not written by attnguide.
    """
    pa = arrow()
    try:
        with place.open(name) as file:
            metadata = pa.parquet.read_metadata(file).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    try:
        written: dict[str, Any] = json.loads(metadata[_KEY])["settings"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{place.path(name)} was not written by attnguide. Move it away, or choose another folder."
        ) from error
    return written


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ."""
    one, other = _flat(before), _flat(now)
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return ", ".join(f"{key} was {one.get(key)!r:.100} and is {other.get(key)!r:.100}" for key in keys)


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings without nesting: `data.rows`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
        found.update(inner)
    return found


# ----------------------------------------------------------------------- reading


@dataclass(frozen=True)
class MapRow:
    """One map, or an image that has none.

    Attributes:
        key: What the image is called: its path, or where it lies.
        cls: Name of the class; None where there is no map.
        index: Index of the class.
        score: Its probability.
        logit: Its logit.
        layer: The layer that was looked at.
        map: `(h, w)`, float32, at the layer's resolution; None where there is none.
        error: Why there is none.
    """

    key: str
    cls: str | None
    index: int | None
    score: float | None
    logit: float | None
    layer: str | None
    map: npt.NDArray[np.float32] | None
    error: str | None


class Maps:
    """The maps of a data set, in the order of its images; iterating reads them part by part.

    Attributes:
        address: The folder: a path, or an address.
        settings: What the maps were made with.
        numbers: Numbers of the parts that are there.
    """

    def __init__(self, out: str | Path, where: str | pc.Expression | None = None) -> None:
        self._place = Place(out)
        self.address = self._place.address
        self._names = sorted(name for name in self._place.names() if part_number(name) is not None)
        if not self._names:
            raise DataError(
                f"{out} holds no maps: there is no {part_name(0)}. Give the folder that explain_dataset or "
                "`attnguide explain --format parquet` wrote to."
            )
        self.numbers = [number for name in self._names if (number := part_number(name)) is not None]
        self.settings = self._settings(self._names[0])
        self._where: pc.Expression | None = _expression(where) if isinstance(where, str) else where

    def _settings(self, name: str) -> dict[str, Any]:
        found = part_settings(self._place, name)
        if found is None:
            raise DataError(
                f"{self._place.path(name)} is damaged. Remove it, and run the command again: it makes what "
                "is missing."
            )
        return found

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows as Arrow, part by part; memory does not grow with their number.

        Args:
            columns: Names of the columns; all by default.

        Raises:
            DataError: If a part is damaged, or was made with other settings than the first.
        """
        pa = arrow()
        for name in self._names:
            settings = self._settings(name)
            if settings != self.settings:
                raise DataError(
                    f"{self._place.path(name)} was made with other settings than {self._names[0]}: "
                    f"{differences(self.settings, settings)}. Keep runs in folders of their own."
                )
            try:
                with self._place.open(name) as file:
                    opened = pa.parquet.ParquetFile(file)
                    for group in range(opened.num_row_groups):
                        if self._where is None:
                            table = opened.read_row_group(group, columns)
                        else:
                            table = opened.read_row_group(group).filter(self._where)
                            table = table if columns is None else table.select(columns)
                        yield from table.replace_schema_metadata(None).to_batches()
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{self._place.path(name)} is damaged ({error}). Remove it, and run the command again: "
                    "it makes what is missing."
                ) from error

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows into one table; see `batches` for what does not fit into memory."""
        pa = arrow()
        schema = _schema()
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        return pa.Table.from_batches(self.batches(columns), schema)

    def where(self, condition: str | pc.Expression) -> Maps:
        """Return the maps whose rows fulfil a condition as well.

        Args:
            condition: Text, such as `class = 'hen' and score > .9`, or `error is not null`; or an expression
                of pyarrow.

        Raises:
            InputError: If it is not understood, or there is no such column.
        """
        more = _expression(condition) if isinstance(condition, str) else condition
        return Maps(self.address, more if self._where is None else self._where & more)

    def __iter__(self) -> Iterator[MapRow]:
        for batch in self.batches():
            values = batch.column("map").values.to_numpy(zero_copy_only=False)
            offsets = batch.column("map").offsets.to_numpy()
            rows = batch.drop_columns("map").to_pylist()
            for number, row in enumerate(rows):
                found = None
                if row["h"] is not None:
                    found = values[offsets[number] : offsets[number + 1]].astype(np.float32)
                    found = found.reshape(row["h"], row["w"]) * np.float32(row["scale"])
                yield MapRow(
                    row["key"],
                    row["class"],
                    row["index"],
                    row["score"],
                    row["logit"],
                    row["layer"],
                    found,
                    row["error"],
                )


def _expression(text: str) -> pc.Expression:
    arrow()
    return condition(text, _schema().names)


def read_maps(out: str | Path, where: str | None = None) -> Maps:
    """Read what [`explain_dataset`][attnguide.explain_dataset] wrote.

    ```python
    for row in ag.read_maps("maps", "class = 'hen' and score > .9"):
        print(row.key, row.map.shape)
    table = ag.read_maps("maps").to_arrow(["key", "class", "score"])
    ```

    Args:
        out: The folder: a path, or an address such as `s3://bucket/maps`.
        where: A condition on the rows.

    Returns:
        The maps, read as they are iterated over.

    Raises:
        DataError: If there are none, or they are damaged.
        InputError: If the condition is not understood, or pyarrow is missing.
    """
    return Maps(out, where)


def check_parts(
    place: Place, numbers: Iterable[int], settings: Mapping[str, Any]
) -> tuple[set[int], list[str]]:
    """Check the parts that are there before a run goes on.

    Args:
        place: The folder.
        numbers: Parts that are there.
        settings: Settings of the run.

    Returns:
        The parts that are whole, and names of those that are damaged.

    Raises:
        InputError: If a part was made with other settings.
    """
    whole, damaged = set(), []
    for number in numbers:
        name = part_name(number)
        found = part_settings(place, name)
        if found is None:
            damaged.append(name)
        elif digest(found) != digest(settings):
            raise InputError(
                f"{place.path(name)} was made with other settings: {differences(found, settings)}. Give the "
                "same, or another folder."
            )
        else:
            whole.add(number)
    return whole, damaged
