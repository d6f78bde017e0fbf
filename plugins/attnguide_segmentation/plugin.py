"""Declares what this plugin provides."""

from __future__ import annotations

from attnguide.parts.hookspecs import Part, hookimpl

__all__ = ["attnguide_parts"]


@hookimpl
def attnguide_parts() -> list[Part]:
    """Declare the prior, the adapters and the regions of the parser."""
    package = "attnguide_segmentation"
    return [
        Part(
            "prior",
            "segmentation",
            f"{package}.prior:SegmentationPrior",
            "the regions of a face that show an attribute",
        ),
        Part(
            "regions",
            "face_parser",
            f"{package}.region_source:ParsedRegions",
            "the seven regions of a face, found by a parser",
        ),
        Part(
            "adapter",
            "ssp",
            f"{package}.pooling:SSP",
            "pools inside the regions of a face, and learns their weights",
        ),
        Part("adapter", "ssg", f"{package}.gating:SSG", "gates features by the regions of a face"),
        Part(
            "adapter",
            "pyramid",
            f"{package}.pooling:PyramidPooling",
            "average or pyramid pooling, to compare with",
        ),
        Part(
            "adapter",
            "mask_channels",
            f"{package}.gating:MaskChannels",
            "region masks as further channels of the image",
        ),
    ]
