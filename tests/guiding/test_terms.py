"""Terms: which pairs are compared, and what their mean is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import nn

import attnguide as ag
from attnguide.errors import InputError
from attnguide.guiding.terms import generator_of
from attnguide.pairs import Pairs, resolve


def test_a_draw_stands_for_all_pairs() -> None:
    logits = torch.randn(5, 12)
    labels = (torch.rand(5, 12) > 0.4).float()
    labels[3] = 0
    pairs = resolve("labels", logits, labels)
    worth = torch.rand(len(pairs))
    counted = torch.rand(len(pairs)) > 0.2
    exact = float((worth * counted).sum())
    sums = []
    for _ in range(3000):
        index, stands_for = pairs.draw(4, counted, 5)
        assert bool(counted[index].all())
        assert int(pairs.sample[index].bincount().max()) <= 4
        sums.append(float((worth[index] * stands_for).sum()))
    mean, error = torch.tensor(sums).mean(), torch.tensor(sums).std() / len(sums) ** 0.5
    assert abs(float(mean) - exact) < 5 * float(error)
    index, stands_for = pairs.draw(12, counted, 5)  # all there are
    assert torch.equal(index, counted.nonzero()[:, 0])
    assert bool((stands_for == 1).all())
    assert len(Pairs.of(pairs.sample[:0], pairs.cls[:0]).draw(2, counted[:0], 5)[0]) == 0


def test_drawing_is_the_default_only_where_classes_cost() -> None:
    images, _, masks = batch()
    labels = torch.ones(4, 12)

    def pairs_of(model: nn.Module, **settings: Any) -> int:
        with ag.Guide(model, terms=[ag.Term(targets="all", **settings)]) as guide:
            model(images)
            guide.loss(labels, mask=masks)
            return len(guide.records()[0].pairs)

    assert pairs_of(cnn(classes=12)) == 48
    assert pairs_of(tiny_vit(classes=12)) == 16
    assert pairs_of(tiny_vit(classes=12), max_classes=None) == 48
    assert pairs_of(tiny_vit(classes=12), max_classes=7) == 28
    assert pairs_of(tiny_vit(classes=12), source="layer_attention") == 48
    for wrong in (0, -1, "some", 1.5):
        with pytest.raises(InputError, match="max_classes="):
            ag.Guide(cnn(), terms=[ag.Term(max_classes=wrong)])


def test_the_weight_grows_linearly() -> None:
    term = ag.Term(weight=2.0, warmup=4)
    assert [term.weight_at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert ag.Term(weight=2.0).weight_at(0) == 2.0


def test_a_record_holds_what_was_compared() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    with ag.Guide(model, loss="mse") as guide:
        model(images)
        loss = guide.loss(labels, mask=masks)
        (record,) = guide.records()
    assert record.layer == "block4"
    assert record.pairs.cls.tolist() == labels.tolist()
    assert record.maps.shape == record.prior.shape == (4, 4, 4)
    # The prior is the share of each cell that the mask covers.
    torch.testing.assert_close(record.prior, nn.functional.avg_pool2d(masks[:, None], 8)[:, 0])
    torch.testing.assert_close(record.losses, ag.functional.mse_loss(record.maps, record.prior))
    torch.testing.assert_close(record.losses.mean(), loss.detach())


def test_the_mean_over_accumulated_batches() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    with ag.Guide(model, terms=[ag.Term(), ag.Term(loss="mse", weight=0.5)]) as guide:
        model(images)
        own = guide.loss(labels, mask=masks)
        model(images)
        torch.testing.assert_close(guide.loss(labels, mask=masks, normalize_by=8), own / 2)
        torch.testing.assert_close(guide.loss(labels, mask=masks, normalize_by=[4, 4]), own)
        trust = torch.tensor([0.5, 0.0, 1.0, 0.5])
        mean = guide.loss(labels, mask=masks, sample_weight=trust)
        torch.testing.assert_close(
            guide.loss(labels, mask=masks, sample_weight=trust, normalize_by=4.0), mean / 2
        )
        assert float(guide.loss(labels, mask=None, normalize_by=0).detach()) == 0
        for wrong, message in [
            (2, r"this one alone has 4\. Give their number"),
            (0, "this one alone has 4"),
            (float("nan"), "normalize_by=nan"),
            (float("inf"), "normalize_by=inf"),
            ([4, 3], r"normalize_by=\[4\.0, 3\.0\]"),
            ([4, 4, 4], "one for each of the 2 terms"),
            ("all", "normalize_by='all' must be a number"),
        ]:
            with pytest.raises(InputError, match=message):
                guide.loss(labels, mask=masks, normalize_by=wrong)  # type: ignore[arg-type]


def test_draws_leave_the_random_numbers_of_others_as_they_are() -> None:
    images, _, masks = batch()
    labels = torch.ones(4, 12)

    def trained(guided: bool) -> tuple[list[torch.Tensor], list[list[int]]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.1), tiny_vit(classes=12))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        term = ag.Term(targets="all", max_classes=3, weight=0.0, seed=2, layer="1.blocks.0")
        guide = ag.Guide(model, terms=[term]) if guided else None
        drawn = []
        for _ in range(3):
            loss = nn.functional.binary_cross_entropy_with_logits(model(images), labels)
            if guide is not None:
                loss = loss + guide.loss(labels, mask=masks)
                drawn.append(guide.records()[0].pairs.cls.tolist())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], drawn

    plain, _ = trained(False)
    guided, drawn = trained(True)
    for weight, expected in zip(guided, plain, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    assert drawn[0] != drawn[1] != drawn[2]
    assert trained(True)[1] == drawn
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="seed="):
            ag.Guide(cnn(), terms=[ag.Term(seed=wrong)])  # type: ignore[arg-type]


def test_draws_differ_between_seeds_steps_and_processes() -> None:
    device = torch.device("cpu")
    moments = [(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)]
    first = {float(torch.rand((), generator=generator_of(device, *moment))) for moment in moments}
    assert len(first) == len(moments)
    assert abs(sum(first) / len(first) - 0.5) < 0.06  # four standard errors


def test_annotated_pairs_are_counted_without_a_pass() -> None:
    images, labels, masks = batch(8)
    masks[2] = torch.nan
    several = [ag.Term(loss="mse"), ag.Term(loss="mse", targets="all", max_classes=1, layer="block3")]
    with ag.Guide(cnn(), terms=several) as guide:
        with pytest.raises(ag.errors.GuidanceError, match="before a forward"):
            guide.count(images, labels, mask=masks)
        guide.model(images[:2])  # of another size than the batch
        assert guide.count(images, labels, mask=masks) == [7, 28]
        assert guide.count(images, labels, mask=None) == [0, 0]
        trust = torch.tensor([0.5] * 4 + [0.0] * 4)
        assert guide.count(images, labels, mask=masks, sample_weight=trust) == [1.5, 6]
        several_labels = torch.zeros(8, 4)
        several_labels[:3, :2] = 1
        assert guide.count(images, several_labels, mask=[*masks[:7], None]) == [4, 24]
        with pytest.raises(ag.errors.InputError, match="points="):
            guide.count(images, labels, mask=masks, points=None)
    with ag.Guide(cnn(), targets="predicted") as guide:
        guide.model(images)
        with pytest.raises(ag.errors.InputError, match="cannot be counted before"):
            guide.count(images, labels, mask=masks)
