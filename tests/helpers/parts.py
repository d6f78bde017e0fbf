"""The parts that come with the core, as its own declaration lists them, whatever plugins are installed."""

from __future__ import annotations

from attnguide.parts.hookspecs import Kind
from attnguide.parts.standard import attnguide_parts


def standard(kind: Kind) -> list[str]:
    """Names of the standard parts of a kind, sorted."""
    return sorted(part.name for part in attnguide_parts() if part.kind == kind)
