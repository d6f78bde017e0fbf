"""How the names of classes are compared."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["class_key"]


def class_key(name: str) -> str:
    """What names of one class share: case does not matter, nor whether there is `_` or a space."""
    # Some file systems store é as e and an accent: NFKC makes one letter of them again.
    return " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFKC", name).casefold().strip()))
