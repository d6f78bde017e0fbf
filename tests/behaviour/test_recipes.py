"""The recipes of published methods are what their publications add to the loss, computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.clip import clip, tokenizer
from tests.helpers.models import batch, cnn, tiny_vit
from torch.nn import functional as F

import attnguide as ag
from attnguide.functional import resize
from attnguide.priors import TextPrior, TokenCutPrior
from attnguide.training import method_of, read_settings

IMAGES, LABELS, _ = batch()


def test_gals_suppresses_the_gradient_of_the_cross_entropy_where_the_words_are_not() -> None:
    model = cnn().eval()
    prior = TextPrior("a bird", model=clip(), tokenizer=tokenizer())
    prior.prepare(model, 4)
    regions = resize(prior.find(IMAGES, LABELS).maps, (32, 32))
    expected = torch.zeros(())
    for image, label, region in zip(IMAGES, LABELS, regions, strict=True):
        own = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(own), label[None]), own)
        outside = 1 - region
        expected = expected + 100 * (outside * gradient[0].norm(dim=0)).sum() / outside.sum() / len(IMAGES)
    with ag.Guide.from_recipe(model, "gals", prior=prior) as guide:
        model(IMAGES)
        torch.testing.assert_close(guide.loss(LABELS).detach(), expected, rtol=1e-4, atol=1e-6)
        assert guide.check(IMAGES, LABELS).unreached == []


def test_robust_vit_keeps_relevance_inside_of_the_object() -> None:
    torch.manual_seed(0)
    model = tiny_vit().eval()
    prior = TokenCutPrior(tiny_vit(), similarity=0.7)
    prior.prepare(None, 4)
    maps = ag.explain(model, IMAGES, "transformer_relevance", "labels", labels=LABELS, size=None).maps[:, 0]
    objects, weights = prior.find(IMAGES, LABELS)
    expected = []
    for map_, object_, weight in zip(maps, objects, weights.tolist(), strict=True):
        scaled = map_ / map_.max()
        outside = F.mse_loss(scaled * (1 - object_), torch.zeros(4, 4))
        inside = F.mse_loss(scaled * object_, object_)
        if weight:
            expected.append(0.8 * (2 * outside + 0.3 * inside))
    with ag.Guide.from_recipe(model, "robust-vit", prior=prior) as guide:
        model(IMAGES)
        torch.testing.assert_close(guide.loss(LABELS).detach(), torch.stack(expected).mean())


def test_distillation_compares_with_the_model_before_its_training() -> None:
    model = cnn().eval()
    before = ag.explain(model, IMAGES, targets="labels", labels=LABELS, size=None).maps[:, 0].flatten(1)
    with ag.Guide.from_recipe(model, "distillation") as guide:
        model(IMAGES)
        guide.loss(LABELS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model(IMAGES)
        guide.loss(LABELS)
        (record,) = guide.records()
        kept = before[record.pairs.sample]
    torch.testing.assert_close(record.losses, 1 - F.cosine_similarity(record.maps.flatten(1), kept))


@pytest.mark.parametrize("name", ["gals", "robust-vit", "distillation", "gain"])
def test_recipes_can_be_trained(name: str, tmp_path: Path) -> None:
    settings = read_settings({"recipe": name, "data": str(tmp_path), "model": "vit_tiny_patch16_224"})
    method = method_of(settings)
    assert (method.kind, method.recipe, method.annotations) == ("guide", name, ())
    assert settings.train.task_weight == (0.2 if name == "robust-vit" else 1.0)
