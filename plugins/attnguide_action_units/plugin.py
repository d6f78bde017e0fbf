"""Declares what this plugin provides."""

from __future__ import annotations

from attnguide.parts.hookspecs import Part, hookimpl

__all__ = ["attnguide_parts"]


@hookimpl
def attnguide_parts() -> list[Part]:
    """Declare prior, regions, recipe and command; source and loss of the method are standard parts."""
    return [
        Part(
            "prior",
            "action_units",
            "attnguide_action_units.prior:ActionUnitPrior",
            "where an expression's facial action units are, from landmarks",
        ),
        Part(
            "regions",
            "landmarks",
            "attnguide_action_units.region_source:LandmarkRegions",
            "the parts of a face between its landmarks",
        ),
        Part(
            "recipe",
            "au-codebook",
            "attnguide_action_units:recipes/au-codebook.toml",
            "layer attention towards the action units of the expression (arXiv 2402.00281)",
        ),
        Part(
            "command",
            "landmarks",
            "attnguide_action_units._command:landmarks",
            "Find facial landmarks in images.",
        ),
    ]
