"""What a user does beside the guidance is as it would be without it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.swa_utils import AveragedModel

import attnguide as ag
from attnguide.errors import GuidanceError
from attnguide.layers import _memory as memory, find_layers

Gradients = dict[str, Tensor]
IMAGES, LABELS, MASKS = batch()
IMAGES = IMAGES.double()
PATCHES = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Gradients:
    model.zero_grad()
    loss(model).backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def entropy(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def check(model: nn.Module, loss: Callable[[nn.Module], Tensor], **settings: Any) -> None:
    """A step with a guide attached, whose weight is zero, is a plain step."""
    model = model.double().train()
    plain = gradients(model, loss)
    with ag.Guide(model, weight=0.0, **settings):
        model(IMAGES)  # finds the layer
        assert_same(gradients(model, loss), plain)
    assert_same(gradients(model, loss), plain)


# ------------------------------------------------------------------------ losses


def test_a_loss_on_patches_that_bypasses_the_root() -> None:
    check(tiny_vit(), lambda model: (model.forward_features(IMAGES)[:, 1:] * PATCHES).sum())
    check(tiny_vit(), lambda model: model.forward_intermediates(IMAGES, intermediates_only=True)[-1].sum())


def test_blocks_that_share_weights() -> None:
    model = tiny_vit(depth=1)
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    check(model, entropy)


class Switch(nn.Module):
    """Answers from the class token or the mean of the patches; keeps and gives tokens if asked."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.body, self.config = tiny_vit(), config
        self.tokens: Tensor | None = None

    def forward(self, images: Tensor, mode: str = "cls", tokens: bool = False) -> Any:
        found = self.tokens = self.body.forward_features(images)
        mode = self.config.mode if self.config is not None else mode
        logits = self.body.head(found[:, 0] if mode == "cls" else found[:, 1:].mean(dim=1))
        return (logits, found) if tokens else logits


@pytest.mark.parametrize(
    "loss",
    [
        lambda model: F.cross_entropy(model(IMAGES, mode="mean"), LABELS),
        lambda model: model(IMAGES, tokens=True)[1][:, 1:].square().sum(),
        lambda model: entropy(model) + model.tokens[:, 1:].square().sum(),
    ],
)
def test_a_model_that_does_more_than_classify(loss: Callable[[nn.Module], Tensor]) -> None:
    check(Switch(), loss)


def test_a_changed_setting_is_noticed() -> None:
    model = tiny_vit().double()
    assert find_layers(model, IMAGES)[0].name == "blocks.1.norm1"
    model.global_pool = "avg"
    memory.forget()
    expected = ag.explain(model, IMAGES).maps
    model.global_pool = "token"
    ag.explain(model, IMAGES)
    model.global_pool = "avg"
    torch.testing.assert_close(ag.explain(model, IMAGES).maps, expected)
    check(model, entropy)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    model.global_pool = "token"
    assert find_layers(model, IMAGES)[0].name == "blocks.2.norm1"


def test_models_of_one_class_that_do_different_things() -> None:
    first = Switch(SimpleNamespace(mode="cls"))
    assert find_layers(first, IMAGES.float())[0].name == "body.blocks.1.norm1"
    other = Switch(SimpleNamespace(mode="mean"))
    assert find_layers(other, IMAGES.float())[0].name != "body.blocks.1.norm1"
    first.tokens = None
    assert memory.fingerprint(first) == memory.fingerprint(Switch(SimpleNamespace(mode="cls")))
    first.extra = lambda: 0
    assert memory.fingerprint(first) is None  # of a closure it cannot be told what it does


def test_state_in_the_tail() -> None:
    class Norm(nn.Module):
        def __init__(self, width: int, **_: Any) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(width)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens.flatten(0, 1)).view_as(tokens)

    model = tiny_vit(norm_layer=Norm).double().train()
    model(IMAGES)
    twin = copy.deepcopy(model)
    with ag.Guide(twin, weight=0.0):
        torch.testing.assert_close(twin(IMAGES), model(IMAGES))
    for found, expected in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_terms_do_not_disturb_each_other() -> None:
    def guided(terms: list[ag.Term]) -> Gradients:
        torch.manual_seed(1)
        model = tiny_vit().double()
        with ag.Guide(model, terms=terms) as guide:

            def loss(model: nn.Module) -> Tensor:
                model(IMAGES)
                return guide.loss(LABELS, mask=MASKS)

            return gradients(model, loss)

    terms = [
        ag.Term(layer="blocks.1.norm1"),
        ag.Term(source="layer_attention", layer="blocks.1", loss="mse"),
    ]
    both, alone = guided(terms), [guided([term]) for term in terms]
    for name, gradient in both.items():
        parts = [part[name] for part in alone if name in part]
        torch.testing.assert_close(gradient, torch.stack(parts).sum(dim=0), rtol=1e-6, atol=1e-9, msg=name)


# ------------------------------------------------------------------------- hooks


def test_hooks_on_all_modules() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        seen.clear()
        return entropy(model) + seen[-1][:, 1:].square().sum() if model(IMAGES) is not None else IMAGES.sum()

    handle = register_module_forward_hook(
        lambda module, _, output: seen.append(output) if isinstance(module, nn.LayerNorm) else None
    )
    try:
        check(tiny_vit(), loss)
    finally:
        handle.remove()


def gelu_net(**head: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, CLASSES),
    )


def test_hooks_on_an_activation() -> None:
    model = gelu_net().double()
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    seen: list[Any] = []
    model.register_parameter("scale", scale)
    with ag.Guide(model, weight=0.0, layer="2"):
        handles = [
            model[1].register_forward_pre_hook(lambda _, args: (args[0] * scale,)),
            model[1].register_forward_hook(lambda _, args, __: seen.append(args[0])),
            model[1].register_full_backward_hook(lambda _, given, __: seen.append(given[0])),
        ]

        def loss(model: nn.Module) -> Tensor:
            seen.clear()
            return entropy(model) + seen[-1].square().mean()  # the probe is seen too

        found = gradients(model, loss)
        assert seen[-1] is not None
    expected = gradients(model, loss)
    for handle in handles:
        handle.remove()
    assert bool(found["scale"] != 0)
    assert_same(found, expected)


def test_what_follows_an_activation_may_work_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv2d(3, 8, 3, 4, 1), act
            self.last, self.head = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.last(self.act(input=self.stem(images)).mul_(2.0)).mean(dim=(2, 3)))

    class Positional(InPlace):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.last(self.act(self.stem(images)).mul_(2.0)).mean(dim=(2, 3)))

    for act in (nn.GELU(), nn.Hardsigmoid()):
        check(Positional(act), entropy, layer="last")
        check(InPlace(act), entropy, layer="last")


@pytest.mark.parametrize("targets", ["labels", "all"])
def test_gelus_behind_a_pooling(targets: str) -> None:
    torch.manual_seed(0)
    model = gelu_net().double()
    with ag.Guide(model, layer="3", targets=targets, loss="cosine") as guide:

        def loss(model: nn.Module) -> Tensor:
            model(IMAGES)
            return guide.loss(LABELS, mask=MASKS)

        found = gradients(model, loss)
        for name in ("6.bias", "6.weight", "8.weight", "2.weight"):
            weight = dict(model.named_parameters())[name]
            direction = found[name] / found[name].norm()
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.add_(sign * 1e-5 * direction)
                values.append(float(loss(model).detach()))
                with torch.no_grad():
                    weight.sub_(sign * 1e-5 * direction)
            difference = (values[0] - values[1]) / 2e-5
            assert difference == pytest.approx(float(found[name].norm()), rel=1e-3), name


def test_functional_calls() -> None:
    model = gelu_net().double()
    weights = {name: w.detach() for name, w in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (IMAGES,)), LABELS)

    plain = torch.func.grad(loss)(weights)
    with ag.Guide(model, layer="2"):
        model(IMAGES)
        assert_same(torch.func.grad(loss)(weights), plain)


# ----------------------------------------------------------------- backward passes


def test_checkpointing_without_the_guidance_term() -> None:
    model = tiny_vit(depth=3).double().train()
    plain = gradients(model, entropy)
    model.set_grad_checkpointing()
    with ag.Guide(model) as guide:
        assert_same(gradients(model, entropy), plain)
        model.zero_grad()
        loss = entropy(model)
        term = guide.loss(LABELS, mask=MASKS)
        loss.backward(retain_graph=True)
        term.backward()
        failures: list[BaseException] = []

        def backward(loss: Tensor) -> None:
            try:
                loss.backward()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=backward, args=(entropy(model) + guide.loss(LABELS, mask=MASKS),))
        thread.start()
        thread.join()
        assert not failures
    assert not ag.explain(model, IMAGES).maps.isnan().any()


def test_two_trainings_in_two_threads() -> None:
    failures: list[BaseException] = []
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()

    def train() -> None:
        try:
            model = tiny_vit()
            with ag.Guide(model, layer="blocks.0") as guide:
                for _ in range(10):
                    model(IMAGES.float())
                    guide.loss(LABELS, mask=MASKS).backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    now = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    assert now == kernels


def test_a_backward_pass_too_early() -> None:
    model = tiny_vit()
    with ag.Guide(model) as guide:
        model(IMAGES.float()).sum().backward()
        with pytest.raises(GuidanceError, match=r"Call guide\.loss before backward"):
            guide.loss(LABELS, mask=MASKS)


# -------------------------------------------------------------------------- names


def test_a_module_that_is_called_module() -> None:
    model = AveragedModel(cnn())
    assert ag.explain(model, IMAGES.float(), layer="module.block3").layer == "module.block3"
    with ag.Guide(model) as guide:
        for side in (32, 64):
            model(torch.rand(4, 3, side, side))
            assert bool(guide.loss(LABELS, mask=MASKS).isfinite())


def test_outputs_with_numbers_as_names() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            first = self.first(images).relu()
            return {"0": first, "1": self.second(first).relu()}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid, self.head = Pyramid(), nn.Linear(6, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.pyramid(images)["1"].mean(dim=(2, 3)))

    model = Net()
    assert ag.explain(model, IMAGES.float()).layer == "pyramid[1]"
    with ag.Guide(model) as guide:
        model(IMAGES.float())
        guide.loss(LABELS, mask=MASKS).backward()
    assert bool(model.pyramid.first.weight.grad.any())


def test_what_a_user_calls_a_cache() -> None:
    model = cnn()
    model.memory_cache = {"a": torch.ones(1)}
    with ag.Guide(model):
        model(IMAGES.float())
    ag.explain(model, IMAGES.float())
    assert list(model.memory_cache) == ["a"]
