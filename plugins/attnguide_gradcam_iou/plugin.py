"""Declares what this plugin provides."""

from __future__ import annotations

from attnguide.parts.hookspecs import Part, hookimpl

__all__ = ["attnguide_parts"]


@hookimpl
def attnguide_parts() -> list[Part]:
    """Declare the recipe of the method; its source, prior and loss are standard parts."""
    return [
        Part(
            "recipe",
            "gradcam-iou",
            "attnguide_gradcam_iou:recipes/gradcam-iou.toml",
            "masks that a user paints, −ln IoU with Grad-CAM (arXiv 1905.00593)",
        ),
        Part(
            "command",
            "annotate",
            "attnguide_gradcam_iou._annotate_command:annotate",
            "Paint where a model should look, in the browser.",
        ),
    ]
