"""`zennit:NAME` is zennit's own relevance, of the models that its rules are for."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import nn
from torchvision.models import resnet18
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer

import attnguide as ag
from attnguide.errors import GuidanceError, InputError
from attnguide.parts.standard import ZENNIT
from attnguide.sources import Zennit
from attnguide.testing import snapshot

IMAGES = batch()[0]


@pytest.mark.parametrize("residual", [False, True])
def test_relevance_is_that_of_zennit(residual: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (resnet18(num_classes=4) if residual else cnn()).eval()
    before = snapshot(model)
    found = ag.explain(model, IMAGES, "zennit:EpsilonPlusFlat", [2])
    assert snapshot(model) == before
    canonizer = ResNetCanonizer() if residual else SequentialMergeBatchNorm()
    logits = model(IMAGES).detach()
    start = torch.zeros_like(logits)
    start[:, 2] = logits[:, 2]
    with Gradient(model, EpsilonPlusFlat(canonizers=[canonizer])) as attributor:
        _, relevance = attributor(IMAGES.clone(), start)
    torch.testing.assert_close(found.maps[:, 0], relevance.sum(dim=1), rtol=1e-3, atol=1e-5)


def test_relevance_is_conserved() -> None:
    """Without biases and with no rule but epsilon's, what the pixels get is the logit."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 4, bias=False)
    )
    found = ag.explain(model, IMAGES, Zennit("EpsilonPlus"), [0, 3])
    # The rule z+ leaves out what is negative in convolutions, and conserves the sum all the same.
    torch.testing.assert_close(found.maps.sum(dim=(2, 3)), found.scores, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ZENNIT)
def test_every_composite_runs(name: str) -> None:
    found = ag.explain(cnn(), IMAGES, f"zennit:{name}")
    assert bool(found.maps.isfinite().all())
    assert bool(found.maps.any())


def test_what_the_rules_are_not_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuidanceError, match=r"no rule for .* zennit knows convolutions"):
        ag.explain(tiny_vit(), IMAGES, "zennit:EpsilonPlus")
    with pytest.raises(InputError, match="looks at the images"):
        ag.explain(cnn(), IMAGES, "zennit:EpsilonPlus", layer="block4")
    with pytest.raises(InputError, match="Did you mean 'EpsilonPlus'"):
        Zennit("EpsilonPlos")
    monkeypatch.setitem(sys.modules, "zennit", None)
    with pytest.raises(InputError, match=r"pip install 'attnguide\[zennit\]'"):
        ag.explain(cnn(), IMAGES, "zennit:EpsilonPlus")
