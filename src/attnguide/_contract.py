"""The contract of all parts, as tests: for `pytest --attnguide NAME`, and for the library's own tests.

Whatever part is used, and whatever goes wrong, a model and the process stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from inspect import signature
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import attnguide as ag
from attnguide import _pytest as plugin
from attnguide.adapters import AdapterSet
from attnguide.interfaces import Adapter, AlignmentLoss, AttributionSource, TargetPrior
from attnguide.pairs import Pairs
from attnguide.parts.hookspecs import Kind
from attnguide.parts.registry import registry
from attnguide.testing import CLASSES, batch, hooks, snapshot, tiny_cnn, tiny_vit
from attnguide.trace import Trace

MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": tiny_cnn, "vit": tiny_vit}
#: What stands beside a part that is tried in a guide.
USUAL = {"source": "grad_cam", "prior": "mask", "loss": "energy"}
ERRORS = pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
WHERE = pytest.mark.parametrize("where", ["front", "behind"])


# ------------------------------------------------------------------------- cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a case of each part that is asked for."""
    names: dict[str, list[str]] = {}
    for kind, name in plugin.chosen(metafunc.config):
        names.setdefault(kind, []).append(name)
    guided = [{**USUAL, kind: name} for kind in ("source", "prior", "loss") for name in names.get(kind, [])]
    generate(metafunc, names, guided)


def generate(
    metafunc: pytest.Metafunc, names: Mapping[str, Sequence[str]], guided: Sequence[Mapping[str, str]]
) -> None:
    """Make the cases of a test.

    Args:
        metafunc: The test.
        names: Names of the parts of each kind.
        guided: Combinations of a source, a prior and a loss for the tests of guides.
    """
    for kind in ("source", "prior", "loss", "adapter", "recipe", "command"):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, names.get(kind, []))
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", list(MODELS), indirect=True)
    if "parts" in metafunc.fixturenames:
        metafunc.parametrize("parts", guided, indirect=True, ids=lambda each: "-".join(each.values()))


def combined(*names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Combine sources, priors and losses so that each occurs once at least."""
    for n in range(max(map(len, names))):
        chosen = (each[n % len(each)] for each in names)
        yield dict(zip(("source", "prior", "loss"), chosen, strict=True))


# ------------------------------------------------------------------------ models


class Bomb(nn.Module):
    """Raises when its time comes."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Return what is given."""
        if self.error is not None:
            raise self.error
        return values


class Mined(nn.Module):
    """A model with something in front, and with something behind, that may raise."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.front, self.body, self.behind = Bomb(), body, Bomb()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.behind(self.body(self.front(images)))
        return logits


def make(name: str) -> Mined:
    """Make a model in a state that is nobody's default: some modules evaluate, some weights are frozen."""
    model = Mined(MODELS[name]())
    model.train()
    next(iter(model.body.children())).eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    parameters[-1].register_hook(lambda gradient: gradient)  # type: ignore[no-untyped-call]
    model.body.register_forward_hook(lambda *_: None)
    return model


def restore(model: Mined) -> None:
    """Undo what a test itself did to the training flags."""
    model.train()
    next(iter(model.body.children())).eval()


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Mined]:
    """A model that has to be as it was when the test ends."""
    torch.manual_seed(0)
    model = make(request.param)
    before = snapshot(model)
    yield model
    for bomb in (model.front, model.behind):
        bomb.error = None
    assert snapshot(model) == before


@pytest.fixture(autouse=True)
def _beside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put on the model what the source of a test shows."""
    values = getattr(getattr(request.node, "callspec", None), "params", {})
    named = (values.get("source"), (values.get("parts") or {}).get("source"))
    asked = {name for name in named if name is not None}
    if values.get("model") == "cnn":
        for name in asked:
            if registry().create("source", name, AttributionSource).reads_attention:
                pytest.skip("a network of convolutions has no attention to read")
    with ExitStack() as stack:
        if "model" in request.fixturenames:
            for name in sorted(asked):
                stack.enter_context(
                    request.config.hook.pytest_attnguide_beside(
                        source=name, model=request.getfixturevalue("model"), images=batch()[0]
                    )
                    or nullcontext()
                )
        yield


def annotations_for(config: pytest.Config, prior: TargetPrior) -> dict[str, Any]:
    """Return what a prior reads, for the batch; skip the test if nobody knows something that it needs."""
    found = {}
    for name, required in prior.annotations.items():
        value = config.hook.pytest_attnguide_annotations(name=name)
        if value is None:
            value = {"mask": batch()[2], "boxes": torch.tensor([[4.0, 4, 20, 24]] * 4)}.get(name)
        if value is not None:
            found[name] = value
        elif required:
            pytest.skip(
                f"{prior!r} reads {name!r}, which nobody knows here: give it by "
                "pytest_attnguide_annotations(name) in conftest.py"
            )
    return found


def made(config: pytest.Config, kind: Kind, name: str, interface: type) -> Any:
    """Make a part with the settings that it needs; skip the test if nobody knows them."""
    settings = config.hook.pytest_attnguide_settings(kind=kind, name=name) or {}
    takes = signature(registry().load_part(kind, name))
    takes.bind_partial(**settings)  # what it does not take is a mistake of the test's
    try:
        takes.bind(**settings)
    except TypeError as error:
        pytest.skip(
            f"{kind} {name!r}: {error}; give it by pytest_attnguide_settings(kind, name) in conftest.py"
        )
    return registry().create(kind, name, interface, **settings)


@pytest.fixture
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A source, a prior and a loss for a guide; the source is Grad-CAM if the one asked for cannot guide."""
    chosen: dict[str, Any] = dict(request.param)
    if not registry().create("source", chosen["source"], AttributionSource).differentiable:
        chosen["source"] = "grad_cam"
    if registry().create("loss", chosen["loss"], AlignmentLoss).reads_prior:
        chosen["prior"] = made(request.config, "prior", chosen["prior"], TargetPrior)
    else:
        del chosen["prior"]
    return chosen


@pytest.fixture
def read(request: pytest.FixtureRequest, parts: dict[str, Any]) -> dict[str, Any]:
    """What the prior of the parts reads."""
    return annotations_for(request.config, parts["prior"]) if "prior" in parts else {}


# ------------------------------------------------------------------ what parts are


def test_a_source_is_what_it_says(source: str) -> None:
    """It is a source, and prints as something."""
    assert repr(registry().create("source", source, AttributionSource))
    assert registry().find("source", source).owner


def test_a_prior_is_what_it_says(pytestconfig: pytest.Config, prior: str) -> None:
    """It is a prior, and prints as something."""
    assert repr(made(pytestconfig, "prior", prior, TargetPrior))
    assert registry().find("prior", prior).owner


def compared(loss: AlignmentLoss, maps: Tensor, priors: Tensor, first: int = 0) -> Tensor:
    """Compare maps as a guide does, in a pass with an image for each, from the first of the batch on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_cnn().eval()
    images, labels = (values[first : first + len(maps)] for values in batch()[:2])
    trace = Trace(images, model(images), {}, differentiable=True, model=model)
    return loss.compare(maps, priors, trace, Pairs.one_each(labels))


def test_a_loss_gives_one_number_for_each_pair(pytestconfig: pytest.Config, loss: str) -> None:
    """The numbers are finite, for maps of zeros too, have a gradient, and do not depend on other pairs."""
    asked = made(pytestconfig, "loss", loss, AlignmentLoss)
    assert repr(asked)
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(3, 5, 6, generator=generator)
    maps[2] = 0
    priors = torch.rand(3, 5, 6, generator=generator)
    maps.requires_grad_()
    losses = compared(asked, maps, priors)
    assert losses.shape == (3,)
    assert bool(losses.isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), maps)
    assert bool(gradient.isfinite().all())
    assert bool(gradient[:2].any())
    alone = torch.cat([compared(asked, maps[n : n + 1], priors[n : n + 1], n) for n in range(3)])
    torch.testing.assert_close(alone, losses)


def test_a_loss_does_not_depend_on_the_scale(pytestconfig: pytest.Config, loss: str) -> None:
    """λ means the same for any source: only the shape of a map counts."""
    asked = made(pytestconfig, "loss", loss, AlignmentLoss)
    generator = torch.Generator().manual_seed(1)
    maps, priors = torch.rand(2, 3, 5, 6, generator=generator)
    torch.testing.assert_close(
        compared(asked, 100 * maps, priors), compared(asked, maps, priors), rtol=1e-3, atol=1e-4
    )


def test_an_adapter_comes_and_goes(pytestconfig: pytest.Config, adapter: str) -> None:
    """It answers with logits of the same shape, its gradients are finite, and it leaves nothing behind."""
    images, labels, _ = batch()
    torch.manual_seed(0)
    model = tiny_cnn().eval()
    before = snapshot(model)
    held = made(pytestconfig, "adapter", adapter, Adapter)
    adapters = AdapterSet(model, [held])
    logits = model(images)
    assert logits.shape == (len(images), CLASSES)
    assert bool(logits.isfinite().all())
    reads = {name: None for name, required in held.annotations.items() if required}
    total = logits.square().sum() + adapters.loss(labels, **reads)
    parameters = [weight for weight in adapters.parameters() if weight.requires_grad]
    for gradient in torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ():
        assert gradient is None or bool(gradient.isfinite().all())
    adapters.remove()
    assert snapshot(model)["hooks"] == before["hooks"]
    assert snapshot(model)["values"] == before["values"]


def test_a_recipe_builds_a_guide(recipe: str) -> None:
    """The recipe says what it is about, and its settings are those of a term."""
    loaded = ag.load_recipe(recipe)
    assert loaded.about
    with ag.Guide(tiny_cnn(), terms=[ag.Term(**{**loaded.guide, "layer": "auto"})]) as guide:
        assert guide.terms


def test_a_command_explains_itself(command: str) -> None:
    """It is a click command with a line in the list, and `--help` works."""
    found = registry().load_part("command", command)
    assert isinstance(found, click.Command)
    assert found.get_short_help_str()
    result = CliRunner().invoke(found, ["--help"])
    assert result.exit_code == 0, result.output


# ---------------------------------------------------------------------- explain


def test_explain(model: Mined, source: str) -> None:
    """Maps are finite, without a graph, and the same again."""
    images, labels, _ = batch()
    found = ag.explain(model, images, source, "labels", labels=labels)
    assert found.maps.shape == (4, 1, 32, 32)
    assert not found.maps.requires_grad
    assert not found.logits.requires_grad
    assert bool(found.maps.isfinite().all())
    again = ag.explain(model, images, source, "labels", labels=labels)
    torch.testing.assert_close(again.maps, found.maps)


def test_several_classes_at_once_are_those_one_by_one(model: Mined, source: str) -> None:
    """No pair depends on another one."""
    if ":" in source:
        pytest.skip("methods of other libraries are tested by themselves")
    images = batch()[0][:2]
    together = ag.explain(model, images, source, "all", size=None)
    for cls in range(CLASSES):
        alone = ag.explain(model, images, source, [cls], size=None)
        torch.testing.assert_close(together.maps[:, cls], alone.maps[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_explain_in_any_gradient_mode(model: Mined, source: str, context: Any) -> None:
    """The caller's mode changes nothing."""
    images, _, _ = batch()
    expected = ag.explain(model, images, source)
    with context():
        found = ag.explain(model, images, source)
    torch.testing.assert_close(found.maps, expected.maps)


@pytest.mark.parametrize("bad", [{"targets": [CLASSES]}, {"targets": "labells"}, {"layer": "body.nowhere"}])
def test_explain_with_bad_arguments(model: Mined, source: str, bad: dict[str, Any]) -> None:
    """Wrong arguments are one error of the library."""
    with pytest.raises(ag.AttnGuideError):
        ag.explain(model, batch()[0], source, **bad)


@WHERE
@ERRORS
def test_explain_while_the_model_raises(model: Mined, source: str, where: str, error: BaseException) -> None:
    """An error of the model is handed on, and leaves nothing."""
    images = batch()[0]
    layer = ag.layers.find_layers(model, images)[0].name
    getattr(model, where).error = error
    with pytest.raises(type(error)):
        ag.explain(model, images, source, layer=layer)


# ------------------------------------------------------------------------ guide


def test_guide(model: Mined, parts: dict[str, Any], read: dict[str, Any]) -> None:
    """The loss is a finite scalar with finite gradients, and records are detached."""
    images, labels, _ = batch()
    model.eval()  # so that batch normalisation leaves its buffers alone
    flags = {name: module.training for name, module in model.named_modules()}
    with ag.Guide(model, **parts) as guide:
        assert hooks(model)
        logits = model(images)
        loss = guide.loss(labels, **read)
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


def test_without_annotations_the_loss_is_zero(pytestconfig: pytest.Config, model: Mined, prior: str) -> None:
    """None for what a prior needs means that nothing is annotated: an exact zero that has a gradient."""
    asked = made(pytestconfig, "prior", prior, TargetPrior)
    needed = dict.fromkeys(name for name, required in asked.annotations.items() if required)
    if not needed:
        pytest.skip("the prior needs no annotation")
    images, labels, _ = batch()
    model.eval()
    with ag.Guide(model, prior=asked) as guide:
        model(images)
        loss = guide.loss(labels, **needed)
        assert float(loss.detach()) == 0
        assert loss.requires_grad
    restore(model)


def test_check(model: Mined, parts: dict[str, Any], read: dict[str, Any]) -> None:
    """The gradient reaches weights."""
    images, labels, _ = batch()
    with ag.Guide(model, **parts) as guide:
        report = guide.check(images, labels, **read)
        assert report.reached
        assert report.layers == guide.layers


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 2, CLASSES]), torch.zeros(3).long()], ids=["range", "size"]
)
def test_guide_with_bad_labels(
    model: Mined, parts: dict[str, Any], read: dict[str, Any], labels: Tensor
) -> None:
    """Wrong labels are one error of the library."""
    model.eval()
    with ag.Guide(model, **parts) as guide:
        model(batch()[0])
        with pytest.raises(ag.AttnGuideError, match="labels"):
            guide.loss(labels, **read)
    restore(model)


@WHERE
@ERRORS
def test_guide_while_the_model_raises(
    model: Mined, parts: dict[str, Any], read: dict[str, Any], where: str, error: BaseException
) -> None:
    """An error of the model is handed on, leaves nothing, and the next pass is guided again."""
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
        guide.loss(labels, **read)
    getattr(model, where).error = None
    model(images)
    guide.loss(labels, **read)
    guide.remove()
    restore(model)
