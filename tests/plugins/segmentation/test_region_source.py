"""The regions of the parser, as a region source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import DataError
from attnguide.interfaces import RegionSource
from attnguide.parts.registry import registry
from attnguide_segmentation.parser import Parser, load_parser, save_parser
from attnguide_segmentation.parsing import ParsingNetwork
from attnguide_segmentation.regions import REGIONS


def test_it_gives_what_its_parser_gives(tmp_path: Path) -> None:
    images = ProceduralFaces(2, seed=3).stack().image.as_subclass(torch.Tensor)
    source = registry().create("regions", "face_parser", RegionSource)
    assert source.names == REGIONS
    assert torch.equal(source(images, [[Path("a.png")], [Path("b.png")]]), load_parser()(images))
    own = Parser(ParsingNetwork(4), size=32)
    save_parser(tmp_path / "own.safetensors", own)
    source = registry().create("regions", "face_parser", RegionSource, parser=tmp_path / "own.safetensors")
    masks = source(images, [[], []])
    assert masks.shape == (2, 7, 32, 32)
    assert torch.equal(masks, load_parser(tmp_path / "own.safetensors")(images))
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    with pytest.raises(DataError, match="not a parser"):
        registry().create("regions", "face_parser", RegionSource, parser=tmp_path / "broken.safetensors")
