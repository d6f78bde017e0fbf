"""Models and images that cannot be worked with are refused in one sentence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
import torch.fx
from tests.helpers.models import cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.capture.suitable import suitable
from attnguide.errors import InputError
from attnguide.layers import find_layers

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Build a small classifier, in evaluation mode."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers).eval()


def traced() -> nn.Module:
    module: nn.Module = torch.jit.trace(net(), IMAGES)  # type: ignore[no-untyped-call]
    return module


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(net())
    return module


def scripted_inside() -> nn.Module:
    whole = nn.Sequential(net()[:3], net()[3:])
    whole[0] = torch.jit.script(whole[0])
    return whole


def exported() -> nn.Module:
    return torch.export.export(net(), (IMAGES,)).module()


def exported_in_parts() -> nn.Module:
    return torch.export.unflatten(torch.export.export(nn.Sequential(net()), (IMAGES,)))


def quantized_head() -> nn.Module:
    made: nn.Module = quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    return made


def quantized_whole() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), net(), quantization.DeQuantStub()).eval()
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(model, inplace=True)
    model(IMAGES)
    made: nn.Module = quantization.convert(model)
    return made


def lazy() -> nn.Module:
    return nn.Sequential(*net()[:4], nn.LazyLinear(5))


def guided(model: nn.Module, *inputs: Any) -> None:
    with ag.Guide(model) as guide:
        model(*inputs)
        guide.loss(torch.tensor([1, 2]), mask=torch.ones(8, 8))


REFUSED: dict[Callable[[], nn.Module], str] = {
    traced: "the model was scripted or traced by torch.jit",
    scripted: "the model was scripted or traced by torch.jit",
    scripted_inside: "module '0' was scripted or traced by torch.jit",
    exported: r"the model was exported by torch\.export",
    exported_in_parts: r"the model was exported by torch\.export",
    quantized_head: r"module '4' is quantized \(Linear\): integers have no gradient",
    quantized_whole: "is quantized .*integers have no gradient",
    lazy: r"module '4' is lazy \(LazyLinear\) .* Run the model on one batch first",
}


@pytest.mark.parametrize("made", list(REFUSED), ids=lambda made: made.__name__)
def test_models_without_layers_or_gradients(made: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():  # these ways to build a model are on their way out
        warnings.simplefilter("ignore")
        model = made()
    for use in (
        lambda: ag.explain(model, IMAGES),
        lambda: guided(model, IMAGES),
        lambda: find_layers(model, IMAGES),
    ):
        with pytest.raises(InputError, match=REFUSED[made]):
            use()


def test_models_that_only_look_like_these() -> None:
    expected = ag.explain(net(), IMAGES).maps
    for model in (torch.fx.symbolic_trace(net()), nn.DataParallel(net()), copy.deepcopy(net())):
        torch.testing.assert_close(ag.explain(model, IMAGES).maps, expected)
    model = lazy()
    model(IMAGES)
    guided(model, IMAGES)
    assert suitable(nn.DataParallel(model)) is model


class Video(nn.Module):
    """A classifier of clips `(B, C, T, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.conv(clips).relu().mean((2, 3, 4)))


class Words(nn.Module):
    """A classifier of the ids of words `(B, T)`."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(dim=1))


class InDict(nn.Module):
    """A classifier that takes a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["image"])


class Signals(nn.Module):
    """A classifier of signals `(B, C, T)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.conv(signals).relu().mean(dim=2))


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (Video(), torch.rand(2, 3, 4, 16, 16), r"\(2, 3, 4, 16, 16\)\. Five axes are those of videos"),
        (Words(), torch.zeros(2, 7).long(), r"\(2, 7\)\. Models of text, ids or tables have no image"),
        (InDict(), {"image": IMAGES}, "dict.*Let the model's forward take the images as an argument"),
        (Signals(), torch.rand(2, 3, 50), r"\(B, C, H, W\).*\(2, 3, 50\)"),
    ],
    ids=["video", "ids", "dict", "signal"],
)
def test_models_of_something_else(model: nn.Module, given: Any, words: str) -> None:
    for use in (
        lambda: ag.explain(model, given),
        lambda: guided(model, given),
        lambda: find_layers(model, given),
    ):
        with pytest.raises(InputError, match=words):
            use()


class WordsAndImages(nn.Module):
    """A classifier of images with a text in front, as vectors `(B, T, D)`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = cnn(5), nn.Linear(6, 5)

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        return self.net(images) + 0 * self.head(text).mean(dim=1)


def test_the_images_may_come_after_something_else() -> None:
    model, plain = WordsAndImages().eval(), cnn(5).eval()
    plain.load_state_dict(model.net.state_dict())
    losses = []
    for each, inputs in ((model, (torch.rand(2, 7, 6), IMAGES)), (plain, (IMAGES,))):
        with ag.Guide(each) as guide:
            each(*inputs)
            losses.append(guide.loss(torch.tensor([1, 2]), mask=torch.eye(8)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
