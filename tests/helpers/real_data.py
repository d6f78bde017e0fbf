"""Photographs, digits and pretrained weights that are no part of the project."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Where they are looked for, beside the repository; else in the folder that the variable names.
BESIDE = ROOT.parent / "shared" / "data"
VARIABLE = "ATTNGUIDE_TEST_DATA"


@dataclass(frozen=True)
class RealData:
    """A folder of real data, or the reason why there is none.

    Attributes:
        folder: The folder; None if there is none.
    """

    folder: Path | None

    @classmethod
    def find(cls) -> RealData:
        """Find the folder beside the repository, or the one that the environment variable names."""
        named = os.environ.get(VARIABLE)
        folders = [BESIDE, *([Path(named).expanduser()] if named else [])]
        return cls(next((folder for folder in folders if folder.is_dir()), None))

    def path(self, name: str) -> Path:
        """Return a file or a folder of the data; skip the test if it is missing."""
        if self.folder is None:
            pytest.skip(f"no real data: there is no folder {BESIDE}, and {VARIABLE} names none")
        path = self.folder / name
        if not path.exists():
            pytest.skip(f"no real data: there is no {name} in {self.folder}")
        return path
