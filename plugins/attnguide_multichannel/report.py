"""A report on multi-channel attention, as one HTML file."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnguide import visual
from attnguide.adapters import AdapterSet, trace_for
from attnguide.data.files import atomic_write
from attnguide_multichannel.adapted import multichannel_of
from attnguide_multichannel.analysis import Analysis
from attnguide_multichannel.figures import (
    correlation_figure,
    mask_figure,
    place_figure,
    reconstruction_sheet,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222 }
h1, h2 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } img { max-width: 100%; image-rendering: pixelated }
"""


def write_report(
    adapted: AdapterSet,
    analysis: Analysis,
    images: Tensor,
    path: str | Path,
    *,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write a report: correlations, important channels, masks, and reconstructions.

    Args:
        adapted: The model and its multi-channel attention.
        analysis: Analysis of a data set.
        images: A few images `(B, 3, H, W)`, for the pictures.
        path: The HTML file, which needs no other file; written atomically.
        about: Facts about the model and the data.

    Raises:
        InputError: If matplotlib is not installed, or the file cannot be written.
    """
    adapter = multichannel_of(adapted)
    features = trace_for(adapter, adapted.model, images).feature.spatial
    with torch.no_grad():
        masks = adapter.masks(features[:1])[0].float().cpu()
        reconstructions = None
        if adapter.reconstructor is not None:
            size = (images.shape[-2], images.shape[-1])
            reconstructions = adapter.reconstructor(features.to(adapter.weight.dtype), size).float().cpu()
    facts = {"samples": analysis.samples, "attributes": len(analysis.classes), **(about or {})}
    facts |= {"channels": analysis.channels.shape[0], "masks": adapter.masking.description}
    parts = [
        "<h1>Multi-channel attention</h1>",
        _table(["", ""], [[key, str(value)] for key, value in facts.items()]),
        "<h2>Which attributes are alike</h2>",
        "<p>Likeness is the mean of two correlations: that of the masks, over all channels, positions and "
        "images, and that of the scores, without its sign. A channel matters as much as it moves the score; "
        "its share of the importance of all channels is given.</p>",
        _table(
            ["attribute", "most alike", "channels that matter"],
            [
                [
                    name,
                    ", ".join(f"{other} ({value:.2f})" for other, value in others),
                    ", ".join(f"{channel} ({share:.0%})" for channel, share in analysis.matters(name)),
                ]
                for name, others in analysis.correlated().items()
            ],
        ),
        _image(_drawn(correlation_figure(analysis.likeness(), analysis.classes)), "Likeness of attributes"),
        "<h2>Where each attribute attends</h2>",
        "<p>Mean of its masks over channels and images, each on its own scale.</p>",
        _image(_drawn(place_figure(analysis)), "Mean masks"),
        "<h2>Masks of one image</h2>",
        "<p>For each attribute, the masks of the channels that matter most to it.</p>",
        _image(visual.to_pil(visual.displayable(images[:1].cpu())[0]), "The image"),
        _image(_drawn(mask_figure(masks, analysis)), "Masks by attribute and channel"),
        "<h2>Which channels are alike</h2>",
        _image(_drawn(correlation_figure(analysis.channels)), "Correlation of channels"),
    ]
    if reconstructions is not None:
        sheet = visual.to_pil(reconstruction_sheet(images.float().cpu(), reconstructions))
        parts += [
            "<h2>Reconstruction</h2>",
            "<p>Images, and below them the reconstructions from their features.</p>",
            _image(sheet, "Images above their reconstructions"),
        ]
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Multi-channel attention</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = line(head, "th") if any(head) else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def _drawn(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _image(picture: bytes | Image.Image, text: str) -> str:
    return f"<p><img alt='{html.escape(text)}' src='{visual.data_uri(picture)}'>"
