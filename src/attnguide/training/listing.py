"""Lists the images of a training: folders of classes, tables of files and labels, CelebA's attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnguide.data.files import natural_key, read_rows, read_text
from attnguide.data.images import find_images
from attnguide.errors import DataError, InputError, MissingPackageError, nearest
from attnguide.training.settings import DataSettings

__all__ = ["Listing", "Sample", "draw_share", "list_images"]

_TRAIN, _VALIDATION = ("train", "training"), ("valid", "val", "validation")
#: Names by which a column is found if none is given.
_FILES = ("file", "image", "path", "filename", "image_path", "img_filename")
_LABELS = ("label", "class", "target", "y")
_ATTRIBUTE_VALUES = {"1": 1.0, "0": 0.0, "-1": 0.0, "": math.nan, "true": 1.0, "false": 0.0}
_CELEBA = "list_attr_celeba.txt"


@dataclass(frozen=True)
class Sample:
    """An image file with its label.

    Attributes:
        path: The file.
        label: The class index, −100 if unknown; or for each attribute 1, 0, or NaN if unknown.
        mask: File of the mask that a table names; None without one.
        annotations: What the table holds for priors, by name.
        completed: File of the mask that is used if there is no other.
    """

    path: Path
    label: int | tuple[float, ...]
    mask: Path | None = None
    annotations: Mapping[str, Any] = field(default_factory=dict)
    completed: Path | None = None


@dataclass(frozen=True)
class Listing:
    """The images of a training.

    Attributes:
        classes: Names of the classes or attributes, in the order of the logits.
        multi_label: Whether an image can have several of them.
        train: Images to train on.
        validation: Images to validate on; may be empty.
        notes: What was left out, one line for each reason.
    """

    classes: tuple[str, ...]
    multi_label: bool
    train: list[Sample]
    validation: list[Sample]
    notes: list[str] = field(default_factory=list)


def list_images(settings: DataSettings, wanted: Sequence[str] = ()) -> Listing:
    """List the images of a training and of its validation.

    Args:
        settings: Where they are, and which column is what.
        wanted: Names of the columns of a table that hold annotations for the prior.

    Returns:
        The images; those of a class are drawn for validation in the same way each time.

    Raises:
        InputError: If a column or folder is missing, or a setting does not fit the data.
        DataError: If a file cannot be read, is missing, or has another form.
    """
    listing = _read(settings, settings.path, settings.classes, wanted)
    if not listing.train:
        raise DataError(f"{settings.path} has no image to train on: every row belongs to another split.")
    if isinstance(settings.validation, Path):
        other = _read(settings, settings.validation, listing.classes, wanted)
        if other.classes != listing.classes:
            unknown = [name for name in other.classes if name not in listing.classes]
            raise DataError(
                f"data.validation = {settings.validation} has the classes {', '.join(unknown)}, which "
                f"{settings.path} has not. Give both the same classes."
            )
        rows = other.validation or other.train
        listing = Listing(listing.classes, listing.multi_label, listing.train + listing.validation, rows)
    elif not listing.validation and settings.validation:
        train, held_out = draw_share([sample.label for sample in listing.train], float(settings.validation))
        rows = listing.train
        listing = Listing(
            listing.classes,
            listing.multi_label,
            [rows[n] for n in train],
            [rows[n] for n in held_out],
            listing.notes,
        )
    _check_overlap(listing)
    return listing


def draw_share(labels: Sequence[object], share: float) -> tuple[list[int], list[int]]:
    """Draw positions for training and for validation from each class, the same each time.

    Args:
        labels: A class index for each image, or attributes, of which no classes are made.
        share: Share for validation, of each class at least one and not all; a class of one image is for
            training.

    Returns:
        The positions, in order.
    """
    generator = torch.Generator().manual_seed(0)
    train: list[int] = []
    held_out: list[int] = []
    by_class: dict[object, list[int]] = {}
    for number, label in enumerate(labels):
        by_class.setdefault(label if isinstance(label, int) else None, []).append(number)
    for cls in sorted(by_class, key=str):
        own = [by_class[cls][n] for n in torch.randperm(len(by_class[cls]), generator=generator).tolist()]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held_out += own[:count]
        train += own[count:]
    return sorted(train), sorted(held_out)


def _check_overlap(listing: Listing) -> None:
    both = {sample.path.resolve() for sample in listing.train} & {
        sample.path.resolve() for sample in listing.validation
    }
    if both:
        raise InputError(
            f"{len(both)} images are both for training and for validation, such as {min(both)}. Validate on "
            "other images."
        )


def _read(
    settings: DataSettings, path: Path, classes: Sequence[str] | None, wanted: Sequence[str]
) -> Listing:
    if path.is_dir():
        attributes = next((p for p in (path / _CELEBA, path / "celeba" / _CELEBA) if p.is_file()), None)
        return _of_folder(path, classes) if attributes is None else _of_celeba(settings, attributes)
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _of_table(settings, path, _csv_columns(path), classes, wanted)
        case ".parquet":
            return _of_table(settings, path, _parquet_columns(path), classes, wanted)
        case ".txt":
            return _of_celeba(settings, path)
    if not path.exists():
        raise InputError(f"data.path = {path} does not exist. Paths are relative to the file they stand in.")
    raise InputError(
        f"data.path = {path} is neither a folder with a subfolder for each class, nor a table (.csv, "
        ".parquet), nor CelebA's list of attributes (.txt)."
    )


# ---------------------------------------------------------------------- folders


def _of_folder(root: Path, classes: Sequence[str] | None) -> Listing:
    folders = _subfolders(root)
    train = [path for path in folders if path.name.lower() in _TRAIN]
    if len(train) == 1 and all(
        path.name.lower() in (*_TRAIN, *_VALIDATION, "test", "testing") for path in folders
    ):
        first = _of_folder(train[0], classes)
        others = [path for path in folders if path.name.lower() in _VALIDATION]
        second = _of_folder(others[0], first.classes).train if others else []
        return Listing(first.classes, False, first.train, second)
    if not folders:
        raise InputError(f"data.path = {root} has no subfolder. It must hold one for each class.")
    names = tuple(path.name for path in folders) if classes is None else tuple(classes)
    if len(names) < 2:
        raise InputError(f"data.path = {root} has one subfolder, {names[0]}: there must be two classes.")
    samples = []
    for folder in folders:
        if folder.name not in names:
            raise DataError(f"{folder} is none of the classes.{nearest(folder.name, names)}")
        samples += [Sample(path, names.index(folder.name)) for path in find_images([folder])]
    return Listing(names, False, samples, [])


def _subfolders(root: Path) -> list[Path]:
    # In the order of torchvision's ImageFolder, which `evaluate` takes too.
    found = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(found, key=lambda path: path.name)


# ----------------------------------------------------------------------- tables


def _csv_columns(path: Path) -> dict[str, list[Any]]:
    rows = read_rows(path)
    header = rows[0]
    if len(set(header)) != len(header):
        raise DataError(f"{path}: two columns have one name in {','.join(header)[:80]!r}.")
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path}, row {line}: {len(row)} cells, expected {len(header)}.")
    return {name: [row[number] for row in rows[1:]] for number, name in enumerate(header)}


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"reading {path}", error.name or "pyarrow", "parquet") from error
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    return columns


def _of_table(
    settings: DataSettings,
    path: Path,
    columns: dict[str, list[Any]],
    classes: Sequence[str] | None,
    wanted: Sequence[str],
) -> Listing:
    if not columns or not next(iter(columns.values())):
        raise DataError(f"{path} has no row. Its first row names the columns, such as file,label.")
    files = columns[_column(path, columns, "data.file", settings.file, _FILES)]
    folder = settings.folder or path.parent
    of_class = settings.label or next((name for name in _LABELS if name in columns), None)
    labels: Sequence[int | tuple[float, ...]]
    if settings.attributes is None and of_class is not None:
        values = columns[_column(path, columns, "data.label", of_class, ())]
        names, labels = _class_labels(path, values, classes)
    else:
        names, labels = _attribute_labels(settings, path, columns, wanted)
    splits = [_split_of(value) for value in columns.get(settings.split, [])]
    masks = columns.get(settings.mask, [None] * len(files))
    samples = [
        Sample(
            folder / str(file).replace("\\", "/"),
            labels[row],
            None if mask in (None, "") else folder / str(mask).replace("\\", "/"),
            {name: _annotation(path, name, columns[name][row]) for name in wanted if name in columns},
        )
        for row, (file, mask) in enumerate(zip(files, masks, strict=True))
    ]
    if not splits:
        return _existing(path, Listing(names, isinstance(labels[0], tuple), samples, []))
    train = [each for each, split in zip(samples, splits, strict=True) if split == "train"]
    valid = [each for each, split in zip(samples, splits, strict=True) if split == "valid"]
    others = len(samples) - len(train) - len(valid)
    notes = [f"{others} rows of {path} belong to another split, such as the test."] if others else []
    return _existing(path, Listing(names, isinstance(labels[0], tuple), train, valid, notes))


def _column(
    path: Path, columns: Mapping[str, Any], setting: str, given: str | None, known: Iterable[str]
) -> str:
    name = given or next((each for each in known if each in columns), None)
    if name is None or name not in columns:
        raise InputError(
            f"{path} has no column {given or 'for the files'}: columns are {', '.join(columns)}. Name it: "
            f"{setting}."
        )
    return name


def _class_labels(
    path: Path, values: Sequence[Any], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    texts = [_text(value) for value in values]
    names = tuple(sorted({text for text in texts if text}, key=natural_key)) if classes is None else classes
    if len(names) < 2:
        raise DataError(f"{path}: all rows have the label {names[0] if names else ''!r}; two are needed.")
    numbers = {name: number for number, name in enumerate(names)}
    unknown = next((text for text in texts if text and text not in numbers), None)
    if unknown is not None:
        raise DataError(f"{path}: {unknown!r} is none of the classes.{nearest(unknown, names)}")
    return tuple(names), [numbers.get(text, -100) for text in texts]


def _attribute_labels(
    settings: DataSettings, path: Path, columns: Mapping[str, list[Any]], wanted: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    others = {settings.file, settings.split, settings.mask, *wanted, *_FILES}
    names = settings.attributes or tuple(name for name in columns if name not in others)
    if not names:
        raise InputError(
            f"{path} has no column of labels. Write file,label or file and a column for each attribute."
        )
    table = []
    for name in names:
        _column(path, columns, "data.attributes", name, ())
        texts = [_text(value).lower() for value in columns[name]]
        wrong = next((text for text in texts if text not in _ATTRIBUTE_VALUES), None)
        if wrong is not None:
            raise DataError(
                f"{path}: column {name!r} holds {wrong!r:.40}; an attribute is 1, 0 or -1, or nothing if "
                "unknown. Name the column of the classes by data.label, or the attributes by data.attributes."
            )
        table.append([_ATTRIBUTE_VALUES[text] for text in texts])
    return tuple(names), [tuple(row) for row in zip(*table, strict=True)]


def _text(value: Any) -> str:
    """Write a label as a table of text has it; nothing for what is missing, and 1 for 1.0."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _split_of(value: Any) -> str:
    text = _text(value).lower()
    return "train" if text in (*_TRAIN, "0") else "valid" if text in (*_VALIDATION, "1") else "other"


def _annotation(path: Path, name: str, value: Any) -> Any:
    """Read numbers of a cell: a list as Parquet and JSON write it, or numbers with spaces between them."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            text = value.strip()
            value = json.loads(text if text.startswith("[") else f"[{','.join(text.split())}]")
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: column {name!r} holds {value!r:.40}, not a list of numbers.") from error


# ----------------------------------------------------------------------- CelebA


def _of_celeba(settings: DataSettings, path: Path) -> Listing:
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if len(lines) < 3 or len(lines[0]) != 1 or not lines[0][0].isdecimal():
        raise DataError(
            f"{path} is not CelebA's list of attributes: a number, a row of names, and a row for each image."
        )
    every = lines[1]
    names = settings.attributes or tuple(every)
    for name in names:
        if name not in every:
            raise InputError(f"data.attributes has {name!r}, which {path} has not.{nearest(name, every)}")
    places = [every.index(name) for name in names]
    folder = settings.folder or path.parent / "img_align_celeba"
    samples = []
    for line, row in enumerate(lines[2:], 3):
        if len(row) != len(every) + 1 or not all(row[place + 1] in ("1", "-1", "0") for place in places):
            raise DataError(f"{path}, row {line}: expected a file and {len(every)} values of 1 or -1.")
        label = tuple(_ATTRIBUTE_VALUES[row[place + 1]] for place in places)
        samples.append(Sample(folder / row[0], label))
    partition = path.with_name("list_eval_partition.txt")
    if not partition.is_file():
        return _existing(path, Listing(tuple(names), True, samples, []))
    splits = dict(line.split()[:2] for line in read_text(partition).splitlines() if len(line.split()) > 1)
    parts = {
        wanted: [each for each in samples if _split_of(splits.get(each.path.name, "")) == wanted]
        for wanted in ("train", "valid")
    }
    return _existing(path, Listing(tuple(names), True, parts["train"], parts["valid"]))


def _existing(path: Path, listing: Listing) -> Listing:
    files = [sample.path for sample in (*listing.train, *listing.validation)]
    files += [sample.mask for sample in (*listing.train, *listing.validation) if sample.mask is not None]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{path} lists {len(missing)} files that do not exist; the first is {missing[0]}. Files are "
            "relative to data.folder, by default the folder of the table."
        )
    return listing
