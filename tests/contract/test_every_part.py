"""Whatever part is used, and whatever goes wrong, a model and the process stay as they were.

The parts come from the registry, so that those of every installed plugin are held to the same contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tests.contract.beside import beside
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from tests.helpers.state import hooks, snapshot
from torch import Tensor, nn

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.guiding.recipe import load_recipe
from attnguide.interfaces import AlignmentLoss, AttributionSource, TargetPrior
from attnguide.parts.registry import registry

SOURCES, PRIORS, LOSSES = (registry().names(kind) for kind in ("source", "prior", "loss"))
# Those of other libraries have tests of their own; here a few stand for them.
SOURCES = [
    name
    for name in SOURCES
    if ":" not in name
    or name
    in (
        "captum:IntegratedGradients",
        "captum:LayerGradientShap",
        "cam:EigenGradCAM",
        "zennit:GuidedBackprop",
    )
]
MODELS = {"cnn": cnn, "vit": tiny_vit}
READ_ATTENTION = {
    name for name in SOURCES if registry().create("source", name, AttributionSource).reads_attention
}

# What priors read, as far as it is known here; a prior that needs something else cannot be tried.
ANNOTATIONS: dict[str, Callable[[], Any]] = {
    "mask": lambda: batch()[2],
    "boxes": lambda: torch.tensor([[4.0, 4, 20, 24]] * 4),
    "landmarks": lambda: ProceduralFaces(4, size=32).stack().landmarks,
    "regions": lambda: torch.arange(32).mul(7).div(32, rounding_mode="floor").expand(4, 32, 32),
}
# What priors have to be told about a model of four classes.
SETTINGS: dict[str, dict[str, Any]] = {
    "teacher": {"source": "cam"},  # which always shows something
    "action_units": {"classes": ["surprise", "fear", "happiness", "sadness"]},
    "segmentation": {"classes": ["smiling", "blond_hair", "pointy_nose", "eyeglasses"]},
}


class Bomb(nn.Module):
    """Raises when its time comes."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return values


class Mined(nn.Module):
    """A model with something in front, and with something behind, that may raise."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.front, self.body, self.behind = Bomb(), body, Bomb()

    def forward(self, images: Tensor) -> Tensor:
        return self.behind(self.body(self.front(images)))


def make(name: str) -> Mined:
    model = Mined(MODELS[name]())
    # Nobody's defaults: some modules evaluate, some weights are frozen, some have gradients.
    model.train()
    next(iter(model.body.children())).eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    parameters[-1].register_hook(lambda gradient: gradient)
    model.body.register_forward_hook(lambda *_: None)
    return model


def readable(prior: TargetPrior) -> dict[str, Any] | None:
    """Return annotations that the prior can read, or None if it needs others."""
    reads = prior.annotations
    if any(required and name not in ANNOTATIONS for name, required in reads.items()):
        return None
    return {name: ANNOTATIONS[name]() for name in reads if name in ANNOTATIONS}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Iterator[Mined]:
    model = make(request.param)
    before = snapshot(model)
    yield model
    for bomb in (model.front, model.behind):
        bomb.error = None
    assert snapshot(model) == before


@pytest.fixture(autouse=True)
def _adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put on the model what the source of a test shows."""
    asked: set[str] = set()
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    for value in params.values():
        asked |= set(value) if isinstance(value, tuple) else {value} if isinstance(value, str) else set()
    if params.get("model") == "cnn" and asked & READ_ATTENTION:
        pytest.skip("a network of convolutions has no attention to read")
    with ExitStack() as stack:
        if "model" in request.fixturenames:
            for name in sorted(asked & set(SOURCES)):
                stack.enter_context(beside(name, request.getfixturevalue("model"), batch()[0]))
        yield


def test_parts_are_what_they_say() -> None:
    for kind, interface in (("source", AttributionSource), ("prior", TargetPrior), ("loss", AlignmentLoss)):
        for name in registry().names(kind):  # type: ignore[arg-type]
            made = registry().create(kind, name, interface)  # type: ignore[arg-type]
            assert repr(made)
            assert registry().find(kind, name).owner  # type: ignore[arg-type]


@pytest.mark.parametrize("name", registry().names("recipe"))
def test_every_recipe_builds_a_guide(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    with ag.Guide(cnn(), terms=[ag.Term(**{**recipe.guide, "layer": "auto"})]) as guide:
        assert guide.terms


# ---------------------------------------------------------------------- explain


@pytest.mark.parametrize("source", SOURCES)
def test_explain(model: Mined, source: str) -> None:
    images, labels, _ = batch()
    found = ag.explain(model, images, source, "labels", labels=labels)
    assert found.maps.shape == (4, 1, 32, 32)
    assert not found.maps.requires_grad
    assert not found.logits.requires_grad
    assert bool(found.maps.isfinite().all())
    again = ag.explain(model, images, source, "labels", labels=labels)
    torch.testing.assert_close(again.maps, found.maps)


@pytest.mark.parametrize("source", [name for name in SOURCES if ":" not in name])
def test_several_classes_at_once_are_those_one_by_one(model: Mined, source: str) -> None:
    images = batch()[0][:2]
    together = ag.explain(model, images, source, "all", size=None)
    for cls in range(CLASSES):
        alone = ag.explain(model, images, source, [cls], size=None)
        torch.testing.assert_close(together.maps[:, cls], alone.maps[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_explain_in_any_gradient_mode(model: Mined, source: str, context: Any) -> None:
    images, _, _ = batch()
    expected = ag.explain(model, images, source)
    with context():
        found = ag.explain(model, images, source)
    torch.testing.assert_close(found.maps, expected.maps)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bad", [{"targets": [CLASSES]}, {"targets": "labells"}, {"layer": "body.nowhere"}])
def test_explain_with_bad_arguments(model: Mined, source: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ag.AttnGuideError):
        ag.explain(model, batch()[0], source, **bad)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("where", ["front", "behind"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_explain_while_the_model_raises(model: Mined, source: str, where: str, error: BaseException) -> None:
    images = batch()[0]
    layer = ag.layers.find_layers(model, images)[0].name
    getattr(model, where).error = error
    with pytest.raises(type(error)):
        ag.explain(model, images, source, layer=layer)


# ------------------------------------------------------------------------ guide


def combinations() -> Iterator[tuple[str, str, str]]:
    """Each part once at least."""
    for n in range(max(map(len, (SOURCES, PRIORS, LOSSES)))):
        yield SOURCES[n % len(SOURCES)], PRIORS[n % len(PRIORS)], LOSSES[n % len(LOSSES)]


@pytest.fixture(params=combinations(), ids="-".join)
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(zip(("source", "prior", "loss"), request.param, strict=True))
    name = chosen["prior"]
    chosen["prior"] = registry().create("prior", name, TargetPrior, **SETTINGS.get(name, {}))
    if not registry().create("source", chosen["source"], AttributionSource).differentiable:
        chosen["source"] = "grad_cam"
    if name in ("segmenter", "token_cut"):
        pytest.skip(f"prior {name!r} finds no object in noise; it has tests of its own")
    if readable(chosen["prior"]) is None:
        pytest.skip(f"prior {name!r} reads annotations that only its plugin knows")
    return chosen


def test_guide(model: Mined, parts: dict[str, Any]) -> None:
    images, labels, _ = batch()
    model.eval()  # so that batch normalisation leaves its buffers alone
    flags = {name: module.training for name, module in model.named_modules()}
    with ag.Guide(model, **parts) as guide:
        assert hooks(model)
        logits = model(images)
        loss = guide.loss(labels, **readable(parts["prior"]) or {})
        assert loss.shape == ()
        assert bool(loss.isfinite())
        assert loss.requires_grad
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss + logits.sum(), parameters, allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in found if g is not None)
        (record,) = guide.records()
        assert record.maps.shape == record.prior.shape == (4, *record.maps.shape[1:])
        assert not record.maps.requires_grad
        assert {name: module.training for name, module in model.named_modules()} == flags
    restore(model)


def restore(model: Mined) -> None:
    """Undo what a test itself did to the training flags."""
    model.train()
    next(iter(model.body.children())).eval()


def test_check(model: Mined, parts: dict[str, Any]) -> None:
    images, labels, _ = batch()
    with ag.Guide(model, **parts) as guide:
        report = guide.check(images, labels, **readable(parts["prior"]) or {})
        assert report.reached
        assert report.layers == guide.layers


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 2, CLASSES]), torch.zeros(3).long()], ids=["range", "size"]
)
def test_guide_with_bad_labels(model: Mined, parts: dict[str, Any], labels: Tensor) -> None:
    model.eval()
    with ag.Guide(model, **parts) as guide:
        model(batch()[0])
        with pytest.raises(ag.AttnGuideError, match="labels"):
            guide.loss(labels, **readable(parts["prior"]) or {})
    restore(model)


@pytest.mark.parametrize("where", ["front", "behind"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_guide_while_the_model_raises(
    model: Mined, parts: dict[str, Any], where: str, error: BaseException
) -> None:
    model.eval()
    images, labels, _ = batch()

    def interrupted() -> None:
        with ag.Guide(model, **parts):
            model(images)
            getattr(model, where).error = error
            model(images)

    with pytest.raises(type(error)):
        interrupted()
    getattr(model, where).error = None
    # Without `with`, too: the next forward sets right what an interrupt has left.
    guide = ag.Guide(model, **parts)
    model(images)
    getattr(model, where).error = error
    with pytest.raises(type(error)):
        model(images)
    with pytest.raises(ag.AttnGuideError, match="forward"):
        guide.loss(labels, **readable(parts["prior"]) or {})
    getattr(model, where).error = None
    model(images)
    guide.loss(labels, **readable(parts["prior"]) or {})
    guide.remove()
    restore(model)


@pytest.mark.parametrize(
    "bad",
    [
        {"layer": "body.nowhere"},
        {"source": "grad_kam"},
        {"prior": "masc"},
        {"loss": "iuo"},
        {"weight": float("nan")},
        {"targets": "labells"},
        {"terms": [ag.Term(evidence="logits")]},
        {"terms": [ag.Term(), ag.Term(layer="body.nowhere")]},
        {"terms": []},
    ],
)
def test_a_guide_that_cannot_be_built_leaves_nothing(model: Mined, bad: dict[str, Any]) -> None:
    with pytest.raises(ag.AttnGuideError):
        ag.Guide(model, **bad)


def test_removing_twice_is_fine_and_several_guides_do_not_mix(model: Mined) -> None:
    images, labels, masks = batch()
    model.eval()
    first, second = ag.Guide(model, loss="mse"), ag.Guide(model, loss="cosine")
    model(images)
    values = [float(guide.loss(labels, mask=masks).detach()) for guide in (first, second)]
    first.remove()
    first.remove()
    model(images)
    assert float(second.loss(labels, mask=masks).detach()) == pytest.approx(values[1], rel=1e-5)
    second.remove()
    with ag.Guide(model, loss="mse") as alone:
        model(images)
        assert float(alone.loss(labels, mask=masks).detach()) == pytest.approx(values[0], rel=1e-5)
    restore(model)
