"""Labels and targets of every form become the pairs that they mean."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers.models import batch, cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import InputError
from attnguide.pairs import Pairs, resolve

NAN = math.nan
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [-3.0, -1.0, -2.0], [1.0, 4.0, -0.5]])


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.sample.tolist(), pairs.cls.tolist(), strict=True))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([2, 0, 1]), [(0, 2), (1, 0), (2, 1)]),
        (torch.tensor([2, 0, 1], dtype=torch.int32), [(0, 2), (1, 0), (2, 1)]),
        (torch.tensor([2, 0, 1], dtype=torch.uint8), [(0, 2), (1, 0), (2, 1)]),
        ([2, 0, 1], [(0, 2), (1, 0), (2, 1)]),
        (torch.tensor([2, -100, 1]), [(0, 2), (2, 1)]),
        (torch.tensor([-100, -100, -100]), []),
        (torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]), [(0, 0), (0, 2), (2, 1)]),
        (torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).float(), [(0, 0), (0, 2), (2, 1)]),
        (torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool(), [(0, 0), (0, 2), (2, 1)]),
        (torch.tensor([[0.9, 0.5, 0.51], [0.1, NAN, 0], [NAN, 1, NAN]]) > 0.5, [(0, 0), (0, 2), (2, 1)]),
        (torch.tensor([[1, 0, 1], [0, NAN, 0], [NAN, 1, NAN]]), [(0, 0), (0, 2), (2, 1)]),
        (torch.tensor([[1, -100, 0], [-100, -100, 1], [0, 0, 0]]), [(0, 0), (1, 2)]),
    ],
)
def test_labels(labels: Tensor, expected: list[tuple[int, int]]) -> None:
    assert listed(resolve("labels", LOGITS, labels)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            0.7,
            r"the label of sample 1, class 2 is 0\.7, neither 0 nor 1.*labels > 0\.5.*attnguide\.data\.mix",
        ),
        (0.1, "neither 0 nor 1"),
        (-1, r"that of sample 1, class 2 is -1\. Map −1/1 labels"),
        (2, "labels out of range"),
        (math.inf, "labels out of range"),
    ],
)
def test_labels_that_may_mean_several_things(value: float, message: str) -> None:
    labels = torch.tensor([[1, 0, 0], [0, NAN, value], [0, -100, 1]])
    with pytest.raises(InputError, match=message):
        resolve("labels", LOGITS, labels)


@pytest.mark.parametrize(
    "labels", [[1, 0, 1], [1.0, 0.0, 1.0], [True, False, True], [1.0, NAN, 1.0], [1, -100, 1]]
)
def test_one_logit_makes_labels_binary(labels: list[float]) -> None:
    one = LOGITS[:, :1]
    assert listed(resolve("labels", one, torch.tensor(labels))) == [(0, 0), (2, 0)]
    assert listed(resolve("labels", one, torch.tensor(labels)[:, None])) == [(0, 0), (2, 0)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", [(s, c) for s in range(3) for c in range(3)]),
        ("predicted", [(0, 2), (1, 1), (2, 1)]),
        ([1], [(0, 1), (1, 1), (2, 1)]),
        ((2, 0), [(0, 2), (0, 0), (1, 2), (1, 0), (2, 2), (2, 0)]),
        (range(2), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
        (torch.tensor([0]), [(0, 0), (1, 0), (2, 0)]),
        ([(2, 0), (0, 1), (2, 2)], [(0, 1), (2, 0), (2, 2)]),
        (torch.tensor([[1, 1]]), [(1, 1)]),
    ],
)
def test_targets(targets: object, expected: list[tuple[int, int]]) -> None:
    pairs = resolve(targets, LOGITS)  # type: ignore[arg-type]
    assert listed(pairs) == expected
    # A slot is the rank of a pair within its sample.
    for sample in range(3):
        slots = pairs.slot[pairs.sample == sample].tolist()
        assert slots == list(range(len(slots)))
    assert pairs.slots == int(pairs.slot.max()) + 1


def test_predicted_with_multi_hot_labels_are_the_positive_logits() -> None:
    assert listed(resolve("predicted", LOGITS, torch.zeros(3, 3))) == [(0, 0), (0, 2), (2, 0), (2, 1)]


def test_decision_turns_the_sign_where_the_answer_is_no() -> None:
    pairs = resolve("all", LOGITS, evidence="decision")
    assert pairs.sign.tolist() == [1, -1, 1, -1, -1, -1, 1, 1, -1]
    assert resolve("all", LOGITS).sign.tolist() == [1] * 9


def test_decision_turns_the_map() -> None:
    model, images = cnn().eval(), batch()[0]
    source = ag.registry().load_part("source", "grad_cam")(relu=False)
    plain = ag.explain(model, images, source, "all", size=None)
    turned = ag.explain(model, images, source, "all", size=None, evidence="decision")
    sign = torch.where(plain.logits < 0, -1.0, 1.0)
    assert sign.unique().tolist() == [-1.0, 1.0]
    torch.testing.assert_close(turned.maps, plain.maps * sign[:, :, None, None])


class OneLogit(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.body, self.flat = cnn(1), flat

    def forward(self, images: Tensor) -> Tensor:
        logits = self.body(images)
        return logits[:, 0] if self.flat else logits


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1], [[1.0], [0.0], [1.0], [1.0]]])
def test_a_model_with_one_logit_is_guided_on_its_positives(flat: bool, labels: list[object]) -> None:
    torch.manual_seed(0)
    model = OneLogit(flat).eval()
    images, _, masks = batch()
    with ag.Guide(model) as guide:
        model(images)
        guide.loss(torch.tensor(labels), mask=masks).backward()
        (record,) = guide.records()
    assert listed(record.pairs) == [(0, 0), (2, 0), (3, 0)]
    assert float(model.body.block1[0].weight.grad.abs().sum()) > 0
    assert ag.explain(model, images).classes.tolist() == [[0]] * 4


@pytest.mark.parametrize("targets", ["all", "predicted", [1, 3], [(0, 1), (3, 2), (0, 0)]])
@pytest.mark.parametrize("evidence", ["logit", "decision"])
def test_guided_maps_are_those_that_explain_gives(targets: object, evidence: str) -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    source = ag.registry().load_part("source", "grad_cam")(relu=False)
    options = {"source": source, "targets": targets, "evidence": evidence}
    explained = ag.explain(model, images, **options, labels=labels, size=None)  # type: ignore[arg-type]
    with ag.Guide(model, terms=[ag.Term(**options)]) as guide:  # type: ignore[arg-type]
        model(images)
        guide.loss(labels, mask=masks)
        (record,) = guide.records()
    slot = record.pairs.slot
    assert explained.classes[record.pairs.sample, slot].tolist() == record.pairs.cls.tolist()
    torch.testing.assert_close(record.maps, explained.maps[record.pairs.sample, slot])
