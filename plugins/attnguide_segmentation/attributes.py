"""Which regions of a face show an attribute: a table, as a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnguide.data.files import check_file
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide_segmentation.regions import REGIONS

__all__ = ["CELEBA", "attribute_table", "load_attributes"]

#: The attributes of CelebA and LFWA, in the order of their files.
CELEBA: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip

_DEFAULT = Path(__file__).with_name("attributes.toml")


def load_attributes(path: str | Path | None = None) -> dict[str, tuple[str, ...]]:
    """Read which regions show each attribute.

    Args:
        path: A TOML file with a table `[attributes]` of lists of regions; by default the table of this
            package, with the forty attributes of CelebA and the attributes of the drawn faces.

    Returns:
        The regions of each attribute.

    Raises:
        DataError: If the file is missing, or cannot be read.
        InputError: If an entry is not a list of regions; the message names it.
    """
    if path is None:
        return dict(_default())
    return _read(check_file(path))


@cache
def _default() -> dict[str, tuple[str, ...]]:
    return _read(_DEFAULT)


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a table of attributes: {error}") from error
    table = content.get("attributes")
    if not isinstance(table, Mapping) or not table:
        raise DataError(f"{path} has no table [attributes]; list there the regions of each attribute.")
    for name, regions in table.items():
        if not isinstance(regions, list):
            raise InputError(f"{path}: {name} = {regions!r} must be a list of regions.")
        for region in regions:
            if region not in REGIONS:
                raise InputError(
                    f"{path}: {name} names the region {region!r}; there are {', '.join(REGIONS)}."
                )
    return {name: tuple(regions) for name, regions in table.items()}


def attribute_table(
    classes: Sequence[str], attributes: Mapping[str, Sequence[str]] | str | Path | None = None
) -> Tensor:
    """Make a table of the regions that show each class.

    Args:
        classes: Names of the classes; capitals, blanks and hyphens do not matter.
        attributes: Regions of each attribute, or their file; by default the table of this package.

    Returns:
        1 where a region shows a class, else 0, `(K, 7)`.

    Raises:
        UnknownNameError: If the table lacks a class.
        InputError: If there are no classes, or a region is unknown.
        DataError: If a file cannot be read.
    """
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes={classes!r} must list the name of each class of the model.")
    table = dict(attributes) if isinstance(attributes, Mapping) else load_attributes(attributes)
    known = {_plain(name): regions for name, regions in table.items()}
    rows = torch.zeros(len(classes), len(REGIONS))
    for row, name in zip(rows, classes, strict=True):
        if _plain(name) not in known:
            raise UnknownNameError("attribute", name, list(table))
        for region in known[_plain(name)]:
            if region not in REGIONS:
                raise InputError(f"{name} is shown by {region!r}; there are {', '.join(REGIONS)}.")
            row[REGIONS.index(region)] = 1
    return rows


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")
