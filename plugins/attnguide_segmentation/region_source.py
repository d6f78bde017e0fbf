"""The regions of a face parser, as a source of regions for other plugins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from attnguide.interfaces import RegionSource
from attnguide_segmentation.parser import load_parser
from attnguide_segmentation.regions import REGIONS

__all__ = ["ParsedRegions"]


class ParsedRegions(RegionSource):
    """Finds the seven regions of a face with a parser.

    Args:
        parser: File that [`save_parser`][attnguide_segmentation.parser.save_parser] wrote; by default the
            embedded parser, which knows drawn faces.

    Raises:
        DataError: If the file cannot be read.
    """

    names = REGIONS

    def __init__(self, parser: str | Path | None = None) -> None:
        self.parser = load_parser(parser)

    def __call__(self, images: Tensor, files: Sequence[Sequence[Path]]) -> Tensor:
        """Parse the images; the files are not read."""
        masks: Tensor = self.parser(images)
        return masks
