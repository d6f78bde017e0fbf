"""The logits are found in whatever a model returns, or the error lists what could be meant."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import attnguide as ag
from attnguide.capture.logits import check_spec, describe, find_logits, only_logits, replace_logits
from attnguide.errors import GuidanceError, InputError, LayerError
from attnguide.models import small_cnn

LOGITS, OTHERS, FEATURES = torch.zeros(2, 3), torch.full((2, 3), 2.0), torch.ones(2, 5)
MAPS = torch.zeros(2, 3, 4, 4)
Two = namedtuple("Two", ["embedding", "scores"])


@dataclass
class Answer:
    embedding: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, MAPS),
        (torch.zeros(()), LOGITS, torch.zeros(2, dtype=torch.long)),
        {"x": MAPS, "logits": LOGITS},
        {"embedding": FEATURES, "logits": LOGITS},
        {"maps": [MAPS], "out": LOGITS},
        SimpleNamespace(logits=LOGITS, hidden=FEATURES),
    ],
    ids=["tensor", "tuple", "loss and labels beside", "dict", "features beside", "any key", "object"],
)
def test_logits_are_found_and_replaced(output: Any) -> None:
    assert torch.equal(find_logits(output), LOGITS)
    replaced = replace_logits(output, OTHERS)
    assert type(replaced) is type(output)
    assert torch.equal(find_logits(replaced), OTHERS)


CHOICES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "index": (lambda logits, other: (other, logits), 1),
    "index from the end": (lambda logits, other: [other, logits], -1),
    "key": (lambda logits, other: {"embedding": other, "scores": logits}, "scores"),
    "key with a dot": (lambda logits, other: {"a": other, "b.c": logits}, "b.c"),
    "nested": (lambda logits, other: {"heads": {"color": other, "species": logits}}, "heads.species"),
    "named tuple": (lambda logits, other: Two(other, logits), "scores"),
    "dataclass": (lambda logits, other: Answer(other, logits), "scores"),
    "function": (lambda logits, other: (other, logits), lambda output: output[1]),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_a_choice_among_several(kind: str) -> None:
    make, which = CHOICES[kind]
    with pytest.raises(GuidanceError, match=r"2 tensors.*\(2, 5\).*\(2, 3\)"):
        find_logits(make(LOGITS, FEATURES))
    assert find_logits(make(LOGITS, FEATURES), which) is LOGITS
    replaced = replace_logits(make(LOGITS, FEATURES), OTHERS, which)
    assert find_logits(replaced, which) is OTHERS
    assert type(replaced) is type(make(LOGITS, FEATURES))


def test_one_logit_is_one_class() -> None:
    assert find_logits(torch.zeros(5)).shape == (5, 1)
    assert replace_logits(torch.zeros(5), torch.ones(5, 1)).shape == (5,)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([MAPS, MAPS], "2 feature maps and no logits"),
        ("text", "no logits in the model's output of type str"),
        (torch.zeros(2, 3, 4), r"shape \(2, 3, 4\)"),
        ({"last_hidden_state": torch.zeros(2, 5, 4), "pooler_output": FEATURES}, "features and no logits"),
    ],
    ids=["maps", "text", "tokens", "features"],
)
def test_outputs_without_logits(output: Any, message: str) -> None:
    with pytest.raises(GuidanceError, match=message):
        find_logits(output)


def test_choices_that_cannot_be() -> None:
    for wrong in ("nope", 7, "0.scores"):
        with pytest.raises(GuidanceError, match=r"has no part.*0 \(2, 5\), 1 \(2, 3\)"):
            find_logits((FEATURES, LOGITS), wrong)
    with pytest.raises(GuidanceError, match="gave str, not a tensor"):
        find_logits(LOGITS, lambda output: "text")
    with pytest.raises(GuidanceError, match="function that computes"):
        replace_logits(LOGITS, OTHERS, lambda output: output * 2)
    for wrong in (True, 1.5, ["scores"]):
        with pytest.raises(InputError, match="must be a name, an index, or a function"):
            check_spec(wrong)  # type: ignore[arg-type]


def test_two_functions_are_two_choices() -> None:
    first, second = (lambda output: output[0]), (lambda output: output[1])
    assert describe(first) == describe(first)
    assert describe(first) != describe(second)
    assert describe("a") != describe(0) != describe(None)


def test_a_model_returns_its_logits_alone_for_a_while() -> None:
    model = TwoOutputs(lambda logits, other: (other, logits))
    images = torch.rand(2, 3, 32, 32)
    with only_logits(model, 1):
        assert model(images).shape == (2, 3)
    with only_logits(model, None):
        assert isinstance(model(images), tuple)


class TwoOutputs(nn.Module):
    """A classifier with something beside the logits."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.embed, self.make = small_cnn(3, width=8), nn.Linear(3, 5), make

    def forward(self, images: Tensor) -> Any:
        logits = self.body(images)
        return self.make(logits, self.embed(logits))


@pytest.mark.parametrize("kind", CHOICES)
def test_maps_and_guidance_are_those_of_the_logits_alone(kind: str) -> None:
    make, which = CHOICES[kind]
    plain, model, images = (
        TwoOutputs(lambda logits, other: logits),
        TwoOutputs(make),
        torch.rand(2, 3, 32, 32),
    )
    labels, mask = torch.tensor([0, 2]), torch.rand(2, 8, 8).round()
    with pytest.raises(ag.AttnGuideError, match="could be the logits"):
        ag.explain(model, images)
    for source in ("grad_cam", "input_gradient", "captum:Saliency"):
        expected = ag.explain(plain, images, source)
        found = ag.explain(model, images, source, logits=which)
        torch.testing.assert_close(found.maps, expected.maps)
        assert torch.equal(found.logits, expected.logits)
    losses = []
    for each, choice in ((plain, None), (model, which)):
        with ag.Guide(each, logits=choice) as guide:
            each(images)
            losses.append(guide.loss(labels, mask=mask))
    torch.testing.assert_close(losses[0], losses[1])


def test_two_guides_for_two_heads() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.a, self.b = small_cnn(4, width=8), nn.Linear(4, 3), nn.Linear(4, 6)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features = self.body(images)
            return {"a": self.a(features), "b": self.b(features)}

    model, images = TwoHeads(), torch.rand(2, 3, 32, 32)
    maps = {head: ag.explain(model, images, targets=[1], logits=head).maps for head in "ab"}
    assert not torch.allclose(maps["a"], maps["b"])
    for head, classes in (("a", 3), ("b", 6)):
        # Only one head's labels are valid for it, so the right one was read.
        with ag.Guide(model, logits=head) as guide:
            model(images)
            assert guide.loss(torch.tensor([0, classes - 1]), mask=torch.ones(8, 8)) >= 0
            with pytest.raises(InputError, match="out of range"):
                guide.loss(torch.tensor([0, classes]), mask=torch.ones(8, 8))


def test_an_audit_reads_the_chosen_logits() -> None:
    model, plain = (
        TwoOutputs(CHOICES["key"][0]),
        TwoOutputs(lambda logits, other: logits),
    )
    images, masks = torch.rand(12, 3, 32, 32), torch.zeros(32, 32)
    masks[8:24, 8:24] = 1
    labels = torch.arange(12) % 3
    expected = ag.audit(plain, images, labels, masks)
    found = ag.audit(model, images, labels, masks, logits="scores")
    assert (found.optimized, found.inside, found.witnesses) == (
        expected.optimized,
        expected.inside,
        expected.witnesses,
    )


def headless(kind: str) -> nn.Module:
    resnet = torchvision.models.resnet18(weights=None)
    if kind == "identity":
        resnet.fc = nn.Identity()  # type: ignore[assignment]
        return resnet
    if kind == "children":
        return nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    config.return_dict = kind == "transformers"
    model: nn.Module = transformers.ViTModel(config)
    return model


@pytest.mark.parametrize("kind", ["identity", "children", "transformers", "transformers, a tuple"])
def test_a_backbone_without_a_head_is_refused(kind: str) -> None:
    model, images = headless(kind).eval(), torch.rand(2, 3, 32, 32)
    with pytest.raises(LayerError, match="has no classifier head"):
        ag.explain(model, images)
    guide = ag.Guide(model)
    with pytest.raises(LayerError, match="has no classifier head"):
        model(images)
    guide.remove()
    if kind != "transformers, a tuple":
        which = (lambda output: output[1]) if kind == "transformers" else (lambda output: output)
        assert len(ag.explain(model, images, logits=which).maps) == 2
