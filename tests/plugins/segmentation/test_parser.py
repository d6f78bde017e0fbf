"""Parsers: frozen networks that give masks of the regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.metrics import region_iou
from attnguide_segmentation.parser import EMBEDDED, Parser, load_parser, save_parser, standardized
from attnguide_segmentation.parsing import ParsingNetwork
from attnguide_segmentation.regions import REGIONS, SCHEMES, merged


def parser(side: int = 32) -> Parser:
    torch.manual_seed(0)
    return Parser(ParsingNetwork(4), size=side)


def test_a_parser_is_frozen_and_gives_shares() -> None:
    made = parser()
    made.train()
    assert not any(module.training for module in made.modules())
    assert not any(p.requires_grad for p in made.parameters())
    masks = made(torch.rand(2, 3, 50, 40, requires_grad=True))
    assert masks.shape == (2, 7, 32, 32)
    assert not masks.requires_grad
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, 32, 32))


def test_normalisation_does_not_matter() -> None:
    made, images = parser(), torch.rand(2, 3, 32, 32)
    as_trained = v2.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(made(images), made(as_trained), atol=1e-4, rtol=1e-4)
    assert bool(standardized(torch.ones(1, 3, 8, 8)).isfinite().all())


class Foreign(nn.Module):
    """A segmenter as torchvision's are: 19 labels, in a dictionary."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            "out": images.mean(dim=1, keepdim=True) * torch.linspace(-9, 9, 19)[:, None, None],
            "aux": images,
        }


def test_any_segmenter_will_do() -> None:
    images = torch.rand(2, 3, 16, 16)
    masks = Parser(Foreign(), labels=SCHEMES["celebamask"], prepare=None)(images)
    shares = Foreign()(images)["out"].softmax(dim=1)
    shared = [sum(shares[:, i] for i, n in enumerate(SCHEMES["celebamask"]) if n == name) for name in REGIONS]
    torch.testing.assert_close(masks, torch.stack(shared, dim=1))  # type: ignore[arg-type]
    with pytest.raises(AttnGuideError, match="but 11 labels were named"):
        Parser(Foreign(), labels=SCHEMES["helen"], prepare=None)(images)
    with pytest.raises(AttnGuideError, match="region 'beard'"):
        Parser(Foreign(), labels=["beard"])


def test_parsers_are_saved_and_loaded(tmp_path: Path) -> None:
    made, images = parser(), torch.rand(1, 3, 32, 32)
    made.network.half().float()  # they are kept in half precision
    save_parser(tmp_path / "mine.safetensors", made)
    torch.testing.assert_close(load_parser(tmp_path / "mine.safetensors")(images), made(images))
    plain = Parser(ParsingNetwork(4), prepare=None)
    save_parser(tmp_path / "plain.safetensors", plain)
    again = load_parser(tmp_path / "plain.safetensors")
    assert (again.size, again.prepare) == (None, None)
    with pytest.raises(AttnGuideError, match="cannot be saved"):
        save_parser(tmp_path / "own.safetensors", Parser(ParsingNetwork(4), prepare=lambda image: image))
    with pytest.raises(AttnGuideError, match="only a ParsingNetwork is saved"):
        save_parser(tmp_path / "other.safetensors", Parser(Foreign(), labels=SCHEMES["celebamask"]))
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(AttnGuideError, match="not a parser that attnguide saved"):
        load_parser(tmp_path / "bad.safetensors")


def test_the_parser_that_comes_along_knows_drawn_faces() -> None:
    faces = ProceduralFaces(80, 96, seed=5).stack()
    image, truth = faces.image.as_subclass(Tensor), merged(faces.segmentation.as_subclass(Tensor))
    overlap = region_iou(load_parser()(image).argmax(dim=1), truth)
    assert overlap.mean() > 0.85
    assert overlap.min() > 0.68
    # In warm light, with contrast, a little aside.
    changed = (image.roll(3, dims=3) ** 0.8 * torch.tensor([1.1, 0.95, 0.8])[:, None, None]).clamp(0, 1)
    assert region_iou(load_parser()(changed).argmax(dim=1), truth.roll(3, dims=2)).mean() > 0.8
    assert EMBEDDED.stat().st_size < 2e6
