"""Concepts are a factorisation of the features, which is small only if it fits."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
from tests.helpers.models import batch, cnn

import attnguide as ag
from attnguide.concepts import find_concepts
from attnguide.errors import InputError

IMAGES = batch()[0]


def test_the_factors_are_those_of_pytorch_grad_cam() -> None:
    model, kept = cnn().eval(), []
    handle = model.get_submodule("block4").register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few iterations, on random features
        found = find_concepts(model, IMAGES, 3, "block4")
        vectors, maps = dff(kept[0].numpy().copy(), n_components=3)
    torch.testing.assert_close(found.maps, torch.from_numpy(maps).float())
    torch.testing.assert_close(found.vectors, torch.from_numpy(vectors.T).float())
    assert found.layer == "block4"
    # What is less than the smallest value of a channel was taken off before, and is added to the vectors.
    features = kept[0]
    offset = features.amin(dim=(0, 2, 3))
    product = torch.einsum("bkhw,kc->bchw", found.maps, found.vectors - offset)
    error = (product - (features - offset[:, None, None])).norm() / features.norm()
    assert float(error) < 0.5
    assert found._repr_png_()[:4] == b"\x89PNG"
    assert repr(found) == "Concepts(3 at block4, in 4 images)"


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="count=0"):
        find_concepts(cnn(), IMAGES, 0)
    monkeypatch.setitem(
        sys.modules, "pytorch_grad_cam.feature_factorization.deep_feature_factorization", None
    )
    with pytest.raises(ag.AttnGuideError, match=r"pip install 'attnguide\[grad-cam\]'"):
        find_concepts(cnn(), IMAGES)
