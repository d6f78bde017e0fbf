"""Regions by segmentation networks: a module, an ONNX file, a folder of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import batch, cnn, export_onnx
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import attnguide as ag
from attnguide.errors import DataError, InputError
from attnguide.priors import SegmenterPrior

IMAGES, LABELS, _ = batch()
#: No change of the images.
PLAIN: dict[str, Any] = {"normalization": ([0.0] * 3, [1.0] * 3), "own_normalization": ([0.0] * 3, [1.0] * 3)}


class Channels(nn.Module):
    """Labels: background, and what is brighter than a half in red, green or blue."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        evidence = 40 * (images - 0.5)
        return {"out": torch.cat([torch.zeros_like(evidence[:, :1]), evidence], dim=1)}


def squares() -> Tensor:
    """A red square, a blue one, both, and nothing."""
    images = torch.zeros(4, 3, 32, 32)
    images[0, 0, :8, :8] = images[1, 2, 16:, 16:] = images[2, 0, :8, :8] = images[2, 2, 16:, 16:] = 1
    return images


def test_labels_show_classes() -> None:
    prior = SegmenterPrior(
        Channels(), classes={0: ["red"], 1: [3]}, labels=["none", "red", "green", "blue"], **PLAIN
    )
    images = squares()
    maps, weights = prior.find(images, torch.tensor([0, 0, 1, 1]))
    assert weights.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(maps[0], images[0, 0])
    torch.testing.assert_close(maps[2], images[2, 2])
    assert prior.find(images, torch.tensor([2, 3, 2, 3])).weights.tolist() == [0, 0, 0, 0]
    together = SegmenterPrior(Channels(), **PLAIN).find(images, torch.zeros(4).long())
    torch.testing.assert_close(together.maps[2], images[2].amax(dim=0))
    assert together.weights.tolist() == [1, 1, 1, 0]


def test_it_guides_and_counts_what_is_missing() -> None:
    model = cnn().eval()
    with ag.Guide(model, prior=SegmenterPrior(Channels(), **PLAIN)) as guide:
        model(squares())
        with pytest.warns(UserWarning, match="finds no region for 1 of 4"):
            guide.loss(LABELS)
        assert guide.records()[0].pairs.sample.tolist() == [0, 1, 2]


def test_images_are_normalised_anew() -> None:
    seen: list[Tensor] = []

    class Watching(Channels):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            seen.append(images)
            return super().forward(images)

    prior = SegmenterPrior(Watching(), normalization=([0.5] * 3, [0.5] * 3))
    images = (squares() - 0.5) / 0.5
    prior.find(images, LABELS)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], (squares() - mean[:, None, None]) / std[:, None, None])


def test_an_onnx_file_gives_what_its_module_gives(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 40 * (images[:, :1] - 0.5)

    file = tmp_path / "saliency.onnx"
    export_onnx(Plain(), squares(), file)
    maps, weights = SegmenterPrior(file, **PLAIN).find(squares(), LABELS)
    assert weights.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(maps[0], squares()[0, 0])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"broken\.onnx"):
        SegmenterPrior(tmp_path / "broken.onnx")
    with pytest.raises(DataError, match=r"missing\.onnx"):
        SegmenterPrior(tmp_path / "missing.onnx")


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    config.id2label = {0: "background", 1: "cat"}
    with torch.random.fork_rng():
        network = SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path)
    prior = SegmenterPrior(f"transformers/{tmp_path}", classes={0: ["cat"]}, **PLAIN)
    prior.prepare(None, 4)
    with torch.no_grad():
        maps, _ = prior.find(IMAGES, torch.zeros(4).long())
        expected = network(IMAGES).logits.softmax(dim=1)[:, 1] >= 0.5
    assert torch.equal(maps > 0, expected)


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no segmentation network 'deeplab'"):
        SegmenterPrior("deeplab").prepare(None, 4)
    with pytest.raises(InputError, match=r"has no label 'rad'.*Did you mean 'red'"):
        SegmenterPrior(Channels(), classes={0: ["rad"]}, labels=["none", "red"], **PLAIN).find(
            squares(), LABELS * 0
        )
    with pytest.raises(InputError, match="names class 9"):
        SegmenterPrior(Channels(), classes={9: [1]}).prepare(None, 4)
    with pytest.raises(InputError, match=r"expected logits \(N, L, h, w\)"):
        SegmenterPrior(cnn(), **PLAIN).find(squares(), LABELS)
    with pytest.raises(InputError, match="minimum=2"):
        SegmenterPrior(minimum=2)
    with pytest.raises(DataError, match="cannot be loaded by transformers"):
        SegmenterPrior(f"transformers/{tmp_path}").prepare(None, 4)
    (tmp_path / "a.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises((InputError, DataError), match=r"onnx"):
        SegmenterPrior(tmp_path / "a.onnx")


def test_classes_and_labels_that_do_not_match_drop_out_and_are_counted(tmp_path: Path) -> None:
    """No label shows class 1, and class 3 has a label that is nowhere in the images."""
    model = cnn().eval()
    shown: dict[int, list[str | int]] = {0: ["red"], 2: ["red", "blue"], 3: ["green"]}
    prior = SegmenterPrior(
        Channels(), classes=shown, labels=["none", "red", "green", "blue"], cache=tmp_path, **PLAIN
    )
    with ag.Guide(model, source="cam", prior=prior) as guide:
        model(squares())
        with pytest.warns(UserWarning, match="finds no region for 2 of 4"):
            guide.loss(LABELS)
        assert guide.records()[0].pairs.sample.tolist() == [0, 2]
        guide.loss(LABELS)  # from the cache
        assert guide.records()[0].pairs.sample.tolist() == [0, 2]
    assert (prior.found, prior.missing) == (4, 4)
    with ag.Guide(model, prior=SegmenterPrior(Channels(), classes={0: ["reed"]}, **PLAIN)) as guide:
        model(squares())
        with pytest.raises(InputError, match="has no label 'reed'"):
            guide.loss(LABELS)
