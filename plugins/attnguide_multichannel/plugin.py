"""Declares what this plugin provides."""

from __future__ import annotations

from attnguide.parts.hookspecs import Part, hookimpl

__all__ = ["attnguide_parts"]


@hookimpl
def attnguide_parts() -> list[Part]:
    """Declare the adapter, the source and the command."""
    package = "attnguide_multichannel"
    return [
        Part(
            "adapter",
            "multichannel",
            f"{package}.attention:MultiChannel",
            "a classifier for each attribute, with a mask over channels and positions",
        ),
        Part(
            "source",
            "multichannel",
            f"{package}.source:MultiChannelMaps",
            "mean over the channels of each attribute's mask",
        ),
        Part(
            "command",
            "analyze",
            f"{package}._command:analyze",
            "which attributes are alike, and which channels matter",
        ),
    ]
