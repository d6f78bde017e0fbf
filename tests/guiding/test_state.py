"""The state of a guide in a checkpoint: a resumed run equals one that was never interrupted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import batch, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import InputError
from attnguide.interfaces import Adapter
from attnguide.trace import Trace

CLASSES = 12
IMAGES, _, MASKS = batch()
LABELS = torch.ones(4, CLASSES)


class Head(Adapter):
    """Answers in place of the model, with running statistics."""

    layer = "blocks.1"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, trace: Trace) -> Tensor:
        return self.linear(self.norm(trace.feature.spatial.mean(dim=(2, 3))))


class Run:
    """A training with everything that has a state: warmup, draws, adapters, momentum, a changed weight."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = tiny_vit(CLASSES)
        terms = [
            ag.Term(targets="all", warmup=6, max_classes=3, layer="blocks.0"),
            ag.Term(targets="all", loss="mse", max_classes=2, seed=5, layer="blocks.0"),
        ]
        self.guide = ag.Guide(self.model, terms=terms, adapters=[Head()])
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.guide.parameters()], lr=0.01)

    @property
    def parts(self) -> list[Any]:
        return [self.model, self.guide, self.optimizer]

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            self.guide.terms[1].weight *= 0.9
            logits = self.model(IMAGES)
            guidance = self.guide.loss(LABELS, mask=MASKS)
            (nn.functional.binary_cross_entropy_with_logits(logits, LABELS) + guidance).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(guidance.detach()))
        return losses


def test_a_resumed_run_equals_the_undisturbed(tmp_path: Path) -> None:
    undisturbed = Run()
    expected = undisturbed.steps(8)
    first = Run()
    assert first.steps(4) == expected[:4]
    torch.save([part.state_dict() for part in first.parts], tmp_path / "checkpoint.pt")
    second = Run()
    second.steps(1)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, state in zip(second.parts, states, strict=True):
        part.load_state_dict(state)
    assert second.steps(4) == expected[4:]
    for part, twin in ((second.model, undisturbed.model), (second.guide, undisturbed.guide)):
        for name, value in part.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name], rtol=0, atol=0, msg=name)


def test_the_state_is_numbers_and_tensors() -> None:
    run = Run()
    run.steps(2)
    state = run.guide.state_dict()
    assert state["step"] == 2
    assert [state["terms.0.weight"], state["terms.1.weight"]] == [1.0, pytest.approx(0.81)]
    assert state["adapters.0.norm.num_batches_tracked"] == 2
    assert all(isinstance(value, (int, float, Tensor)) for value in state.values())
    # What tools for checkpoints make of it.
    run.guide.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    assert run.guide.state_dict()["step"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "the state lacks 'step'"),
        ({"terms.1.weight": None}, r"lacks 'terms\.1\.weight'\. This guide has 2 terms and 1 adapters"),
        ({"adapters.0.linear.bias": None, "step": None}, r"lacks 'step' \(and 1 more\)"),
        ({"terms.2.weight": 1.0}, r"an unknown 'terms\.2\.weight'"),
        ({"model.weight": torch.ones(1)}, r"an unknown 'model\.weight'"),
        ({"step": -1}, "step of the state is -1"),
        ({"step": 1.5}, r"step of the state is 1\.5; it must be a whole number"),
        ({"step": True}, "step of the state is True"),
        ({"terms.0.weight": math.nan}, "weight of the state is nan"),
        ({"terms.0.weight": "1"}, "weight of the state is '1'"),
        ({"adapters.0.linear.bias": torch.ones(3)}, r"of shape \(3,\); it must be of shape \(12,\)"),
        ({"adapters.0.linear.bias": 3}, r"linear\.bias of the state is 3"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    run = Run()
    run.steps(1)
    before = {name: torch.as_tensor(value).clone() for name, value in run.guide.state_dict().items()}
    state = {name: torch.as_tensor(value) + 1 for name, value in before.items()} | change
    with pytest.raises(InputError, match=message):
        run.guide.load_state_dict({name: value for name, value in state.items() if value is not None})
    for name, value in run.guide.state_dict().items():
        assert torch.equal(torch.as_tensor(value), before[name]), name


def test_what_is_no_state() -> None:
    with ag.Guide(tiny_vit()) as guide, pytest.raises(InputError, match="is a dict, got list"):
        guide.load_state_dict([1])  # type: ignore[arg-type]
