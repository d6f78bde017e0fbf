"""The contact sheet shows each image with its maps, those of the highest scores first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from tests.helpers.pictures import index_of

from attnguide import models, visual
from attnguide.commands.explain.sheet import NAME, write_sheet


@pytest.mark.parametrize("formats", [["png"], ["npy"], ["npz"]])
def test_maps_are_sorted_by_their_scores(
    call: Callable[..., Result], photos: Path, faces: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, formats: list[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    options = [option for name in formats for option in ("--format", name)]
    call("explain", photos, "--checkpoint", faces, "--target", "all", "--out", out, *options)
    drawn: dict[str, Any] = {}

    def contact_sheet(pictures: Any, captions: Any, **layout: Any) -> Image.Image:
        drawn.update(pictures=list(pictures), captions=list(captions), **layout)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(visual, "contact_sheet", contact_sheet)
    lines = index_of(out)
    assert write_sheet(out, lines, models.load(checkpoint=faces), 0.5) == out / NAME
    width = drawn["group"]
    assert len(drawn["pictures"]) == 5 * width
    assert all(isinstance(picture, Image.Image) for picture in drawn["pictures"])
    for row in range(5):
        captions = drawn["captions"][row * width : (row + 1) * width]
        own = sorted(
            (line for line in lines if Path(line["image"]).name == captions[0]),
            key=lambda line: -line["score"],
        )
        assert [caption.split("  ")[1] for caption in captions[1:]] == [
            line["class_name"] for line in own[: width - 1]
        ]
