"""A cut of features finds what is unlike the rest, and nothing where there is nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from tests.helpers.models import batch, cnn, tiny_vit
from tests.helpers.real_data import RealData
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import attnguide as ag
from attnguide.errors import InputError
from attnguide.models import load
from attnguide.priors import TokenCutPrior, token_cut

IMAGES, LABELS, _ = batch()


def scene(rows: slice, columns: slice) -> Tensor:
    """Features of one kind with noise, and of another kind in a rectangle."""
    generator = torch.Generator().manual_seed(0)
    features = 0.1 * torch.randn(8, 12, 12, generator=generator)
    features[0] += 1
    features[0, rows, columns] -= 1
    features[1, rows, columns] += 1
    return features


@pytest.mark.parametrize(
    ("rows", "columns"), [(slice(3, 7), slice(4, 9)), (slice(0, 4), slice(0, 5)), (slice(8, 12), slice(2, 6))]
)
def test_the_object_is_found(rows: slice, columns: slice) -> None:
    truth = torch.zeros(12, 12)
    truth[rows, columns] = 1
    found = token_cut(scene(rows, columns), 0.5)
    assert found is not None
    torch.testing.assert_close(found, truth)


def test_the_cut_is_the_eigenvector_of_the_whole_problem() -> None:
    features = scene(slice(2, 6), slice(2, 6))
    flat = features.flatten(1).numpy().astype(np.float64)
    flat = flat / np.linalg.norm(flat, axis=0)
    weights = np.where(flat.T @ flat >= 0.5, 1.0, 1e-5)
    degree = np.diag(weights.sum(axis=1))
    vector = linalg.eig(degree - weights, degree)
    second = vector[1][:, np.argsort(vector[0].real)[1]].real
    inside = second > second.mean()
    found = token_cut(features, 0.5)
    assert found is not None
    found_flat = found.flatten().numpy() > 0
    assert (found_flat == inside).all() or (found_flat == ~inside).all()


def test_nothing_where_all_is_alike_or_unlike() -> None:
    assert token_cut(torch.ones(4, 8, 8)) is None
    assert token_cut(torch.eye(64).reshape(64, 8, 8), 0.5) is None
    with pytest.raises(InputError, match="at least 4×4"):
        token_cut(torch.rand(4, 3, 3))


@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_it_guides_by_name(build: type) -> None:
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guide = ag.Guide(model, prior=TokenCutPrior(similarity=0.9), loss="outside")
    model.eval()
    model(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in noise there may be nothing to find
        guide.loss(LABELS)
    (record,) = guide.records()
    assert record.prior.shape == record.maps.shape
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_birds_are_found_by_a_pretrained_network(real_data: RealData) -> None:
    weights = real_data.path("weights/tf_efficientnet_lite0.safetensors")
    folder = real_data.path("birds")
    loaded = load("tf_efficientnet_lite0", checkpoint=weights)
    files = sorted((folder / "images").glob("test_*"))[::50]
    images = torch.stack(
        [
            pil_to_tensor(Image.open(file).convert("RGB").resize((224, 224))).float() / 127.5 - 1
            for file in files
        ]
    )
    masks = torch.stack(
        [
            pil_to_tensor(Image.open(folder / "masks" / f"{file.stem}.png").convert("L").resize((224, 224)))[
                0
            ]
            > 127
            for file in files
        ]
    )
    maps, found = TokenCutPrior(loaded).find(images, torch.zeros(len(files)).long())
    inside = ag.functional.resize(maps, (224, 224)) >= 0.5
    overlap = (inside & masks).flatten(1).sum(1) / (inside | masks).flatten(1).sum(1)
    assert float(overlap[found > 0].mean()) > 0.4  # a mask of the bird's area at random has 0.08


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="similarity=1"):
        TokenCutPrior(similarity=1)
    with pytest.raises(InputError, match="needs a model"):
        TokenCutPrior().find(IMAGES, LABELS)


def test_images_without_an_object_drop_out_and_are_counted(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    prior = TokenCutPrior(network, layer="1", similarity=0.9, cache=tmp_path)
    images = torch.full((4, 3, 32, 32), 0.5)
    images[2, :, 8:16, 8:16] = torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    model = cnn().eval()
    for count in (1, 2):  # the second time from the cache
        with (
            ag.Guide(model, source="cam", prior=prior) as guide,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            model(images)
            guide.loss(LABELS)
            assert guide.records()[0].pairs.sample.tolist() == [2]
        assert [str(each.message)[:50] for each in told] == [
            "TokenCutPrior finds no region for 3 of 4 pairs of t"[:50]
        ] * (count == 1)
        assert (prior.found, prior.missing) == (count, 3 * count)
