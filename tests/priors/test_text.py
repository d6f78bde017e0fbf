"""Regions by words are where a CLIP-like model looks for them, computed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.clip import clip, folder, tokenizer
from tests.helpers.models import batch, cnn
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

import attnguide as ag
from attnguide.errors import DataError, InputError
from attnguide.priors import TextPrior

IMAGES, LABELS, _ = batch()
PLAIN: dict[str, Any] = {"normalization": ([0.0] * 3, [1.0] * 3), "own_normalization": ([0.0] * 3, [1.0] * 3)}
NAMES = ["bird", "boat", "red", "blue"]


def prior(words: Any, **settings: Any) -> TextPrior:
    return TextPrior(words, **{"model": clip(), "tokenizer": tokenizer(), **PLAIN, **settings})


def vector(*texts: str) -> Tensor:
    """Mean unit vector of texts, one by one and without padding."""
    found = []
    for text in texts:
        tokens = tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            found.append(normalize(clip().get_text_features(**tokens).pooler_output, dim=1)[0])
    return normalize(torch.stack(found).mean(dim=0), dim=0)


def relevance(image: Tensor, text: Tensor) -> tuple[Tensor, float]:
    """Attention times its gradient through all blocks (Chefer et al.), block by block; and the cosine."""
    model = clip()
    model.set_attn_implementation("eager")
    found = model.vision_model(pixel_values=image[None], output_attentions=True)
    cosine = normalize(model.visual_projection(found.pooler_output), dim=1)[0] @ text
    gradients = torch.autograd.grad(cosine, found.attentions)
    total = torch.eye(17)
    for attention, gradient in zip(found.attentions, gradients, strict=True):
        total = total + (attention * gradient).clamp(min=0).mean(dim=1)[0] @ total
    tokens = total[0, 1:].detach().reshape(4, 4)
    return tokens / tokens.max(), float(cosine.detach())


def test_maps_are_the_relevance_of_patches_for_the_words_of_the_class() -> None:
    words = {0: "a bird", 1: ["a boat", "a photo of a boat"], 2: "red"}
    with pytest.warns(UserWarning, match="finds no region for 1 of 4"):
        found = record(cnn().eval(), prior(words), layer="block3")
    assert LABELS.tolist() == [0, 1, 2, 3]
    assert found.pairs.sample.tolist() == [0, 1, 2]  # no words for class 3
    texts = [vector("a bird"), vector("a boat", "a photo of a boat"), vector("red")]
    for image, text, map_ in zip(IMAGES, texts, found.prior, strict=False):
        expected, _ = relevance(image, text)
        sized = ag.functional.resize(expected[None], (map_.shape[-2], map_.shape[-1]))[0]
        torch.testing.assert_close(map_, sized, rtol=1e-4, atol=1e-5)


def record(model: nn.Module, asked: TextPrior, layer: str = "block4") -> Any:
    with ag.Guide(model, source="cam", prior=asked, layer=layer) as guide:
        model(IMAGES)
        guide.loss(LABELS)
        return guide.records()[0]


@pytest.mark.parametrize(
    "words",
    [
        ["a bird", None, "", ["zeppelin", "airship"]],
        {"bird": "a bird", "boat": None},
        {"0": "a bird"},
    ],
)
def test_classes_without_words_drop_out_and_are_counted(words: Any) -> None:
    asked = prior(words, classes=NAMES)
    with pytest.warns(UserWarning, match="finds no region for 3 of 4"):
        assert record(cnn().eval(), asked).pairs.sample.tolist() == [0]
    assert (asked.found, asked.missing) == (1, 3)
    nothing = prior("zeppelin")
    with pytest.warns(UserWarning, match="finds no region for 4 of 4"):
        assert not len(record(cnn().eval(), nothing).pairs)
    assert (nothing.found, nothing.missing) == (0, 4)


def test_by_default_words_are_the_names_of_the_classes() -> None:
    named = prior(None, classes=NAMES)
    told = prior(None)
    told.names = NAMES
    written = prior([f"a photo of a {name}" for name in NAMES])
    maps = []
    for each in (named, told, written):
        each.prepare(None, 4)
        maps.append(each.find(IMAGES, LABELS).maps)
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(maps[1], maps[2])
    with pytest.raises(InputError, match="nobody says what the classes are called"):
        record(cnn().eval(), prior(None))


def test_an_image_that_does_not_show_the_words_drops_out() -> None:
    text = vector("a bird")
    cosines = [relevance(image, text)[1] for image in IMAGES]
    middle = sum(sorted(cosines)[1:3]) / 2
    asked = prior("a bird", minimum=middle)
    asked.prepare(None, 4)
    assert asked.find(IMAGES, LABELS).weights.tolist() == [float(cosine >= middle) for cosine in cosines]


def test_images_are_resized_and_normalised_for_the_model(tmp_path: Path) -> None:
    asked = TextPrior("a bird", model=f"hf:{folder(tmp_path)}", normalization=([0.1] * 3, [0.5] * 3))
    images = torch.rand(2, 3, 48, 40)
    found = asked.find((images - 0.1) / 0.5, torch.tensor([0, 0]))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    small = interpolate(images, (32, 32), mode="bilinear", antialias=True)
    for image, map_ in zip(small, found.maps, strict=True):
        expected, _ = relevance((image - mean[:, None, None]) / std[:, None, None], vector("a bird"))
        torch.testing.assert_close(map_, expected, rtol=1e-3, atol=1e-4)


def test_the_cache_asks_once_for_words_and_images(tmp_path: Path) -> None:
    maps = []
    for words in ("a bird", "a bird", "a boat"):
        maps.append(record(cnn().eval(), prior(words, cache=tmp_path)).prior)
    assert len(list(tmp_path.iterdir())) == 8  # four images, two texts
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": 3}, "words=3 must be a text"),
        ({"words": [3]}, "words of a class, 3, must be a text"),
        ({"words": "a bird", "minimum": 2}, "minimum=2 must be a cosine"),
        ({"words": "a bird", "threshold": 0}, "threshold=0"),
        ({"words": "a bird", "model": "vit"}, "model='vit' must be a model of transformers"),
        ({"words": "a bird", "tokenizer": None}, "needs get_text_features"),
        ({"words": ["a bird"]}, "words= has 1 entries, the guided model has 4"),
        ({"words": {7: "a bird"}}, "names class 7; the guided model has 4"),
        ({"words": {"bird": "a bird"}}, "classes= does not say which"),
        ({"words": {"brid": "a bird"}, "classes": NAMES}, "names class 'brid'.*Did you mean 'bird'"),
        ({"words": "a bird", "classes": ["bird"]}, "classes= has 1 names"),
        ({"words": "a " * 20}, "are 22 tokens, the model takes 10"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prior(**settings).prepare(None, 4)


def test_models_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        TextPrior("a bird", model=f"hf:{tmp_path / 'none'}").prepare(None, 4)
    where = folder(tmp_path)
    (where / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match=re.escape(f"{where} cannot be read as a model for images and texts")):
        TextPrior("a bird", model=f"hf:{where}").prepare(None, 4)
