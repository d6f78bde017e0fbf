"""Maps in Parquet files from the command line: made, chosen, drawn over their images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

import attnguide as ag
from attnguide import models, visual

Call = Callable[..., Result]


@pytest.fixture
def maps(photos: Path, call: Call, faces: Path, tmp_path: Path) -> Path:
    out = tmp_path / "maps"
    arguments = ("--format", "parquet", "--out", out, "--workers", 0, "--rows", 2, "--checkpoint", faces)
    result = call("explain", photos, *arguments, "--target", "all")
    assert "5 images in 3 parts, 0 with an error" in result.output
    return out


def test_the_picture_is_that_of_explain(maps: Path, call: Call, tmp_path: Path, faces: Path) -> None:
    row = next(iter(ag.read_maps(maps, "score > 0")))
    loaded = models.load(checkpoint=faces)
    call(
        "overlay",
        *(maps, "--where", f"key = '{row.key}' and index = {row.index}"),
        *("--out", tmp_path / "drawn", "--checkpoint", faces),
    )
    (file,) = (tmp_path / "drawn").iterdir()
    image = loaded.read(row.key)[None]
    found = ag.explain(loaded.model, image, targets=[(0, row.index)])
    expected = visual.overlay(loaded.displayed(image), visual.scaled(found.maps), 0.5)[0, 0]
    drawn = np.asarray(Image.open(file)).astype(int)
    assert np.abs(drawn - expected.permute(1, 2, 0).numpy()).max() <= 2


def test_a_sheet_of_some(maps: Path, call: Call, tmp_path: Path, faces: Path) -> None:
    result = call(
        "overlay",
        maps,
        "--where",
        "index in (0, 2)",
        "--sheet",
        "--limit",
        4,
        "--checkpoint",
        faces,
        "--out",
        tmp_path / "s",
    )
    assert "4 maps drawn, 0 skipped" in result.output
    assert "there are more maps than 4" in result.output
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["contact_sheet.png"]


def test_an_image_that_is_gone_is_named(
    maps: Path, call: Call, photos: Path, tmp_path: Path, faces: Path
) -> None:
    (photos / "2.png").unlink()
    result = call(
        "overlay", maps, "--where", "index = 0", "--out", tmp_path / "drawn", "--checkpoint", faces, status=1
    )
    assert "4 maps drawn, 1 skipped" in result.output
    assert "2.png does not exist" in result.output


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("klass = 'hen'", "unknown column 'klass'"),
        ("score >", "is not understood"),
        ("score > 2", "no map fulfils"),
        ("__import__('os')", "is not understood"),
    ],
)
def test_conditions_that_choose_nothing(maps: Path, call: Call, where: str, message: str) -> None:
    assert message in call("overlay", maps, "--where", where, status=2).output


def test_what_parquet_does_not_go_with(
    photos: Path, call: Call, tmp_path: Path, maps: Path, faces: Path
) -> None:
    both = call("explain", photos, "--format", "parquet", "--format", "png", status=2)
    assert "stands alone" in both.output
    assert "is an address" in call("explain", photos, "--out", "s3://bucket/maps", status=2).output
    assert "holds no maps" in call("overlay", tmp_path / "nowhere", status=2).output
    again = ("explain", photos, "--format", "parquet", "--out", maps, "--workers", 0, "--checkpoint", faces)
    assert "data.rows was 2 and is 4096" in call(*again, status=2).output
    # Nothing is left to do.
    result = call(*again, "--rows", 2, "--target", "all")
    assert "0 images in 0 parts" in result.output


def test_broken_images_are_rows_and_the_exit_status_says_so(photos: Path, call: Call, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "maps"
    result = call("explain", photos, "--format", "parquet", "--out", out, "--workers", 1, status=1)
    assert "6 images in 1 parts, 1 with an error" in result.output
    assert "broken.png is not an image" in result.output
    (row,) = ag.read_maps(out, "error is not null")
    assert (Path(row.key).name, row.map) == ("broken.png", None)
