"""A step is that of a plain loop, and measuring leaves the training as it was."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import GuidanceError, MissingPackageError
from attnguide.metrics import SwappedAccuracy
from attnguide.models import small_cnn
from attnguide.training import Batch, Trainer, accelerator_on

pytest.importorskip("accelerate")


def data(count: int = 12, *, sparse: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 32, 32, generator=generator)
    masks = torch.zeros(count, 32, 32)
    masks[:, 8:24, 4:20] = 1
    if sparse:
        masks[1::3] = math.nan
    return Batch(images, torch.arange(count) % 3, {"mask": masks})


def parted(batch: Batch, parts: int) -> list[Batch]:
    masks = batch.annotations["mask"]
    return [
        Batch(batch.images[n::parts], batch.labels[n::parts], {"mask": masks[n::parts]}) for n in range(parts)
    ]


def without_statistics() -> nn.Module:
    """The mean of a batch must not matter, so that parts can be compared with the whole."""
    torch.manual_seed(0)
    return small_cnn(3, width=4).eval()


def trainer(model: nn.Module, guidance: ag.Guide | ag.Intervention | None) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, optimizer, accelerator_on(torch.device("cpu")), guidance)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("parts", [1, 4])
def test_guided_steps_are_those_of_a_plain_loop(parts: int) -> None:
    model, plain = without_statistics(), without_statistics()
    batch = data()
    with ag.Guide(model, loss="outside", weight=3.0) as guide:
        made = trainer(model, guide)
        for _ in range(5):
            made.step(parted(batch, parts))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with ag.Guide(plain, loss="outside", weight=3.0) as guide:
        for _ in range(5):
            loss = F.cross_entropy(plain(batch.images), batch.labels)
            loss = loss + guide.loss(batch.labels, mask=batch.annotations["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=1e-6)
    measured = made.finish_epoch()
    assert measured.loss is not None
    assert measured.guidance is not None
    assert made.steps == 5


def test_pairs_that_depend_on_the_prediction_cannot_be_counted_ahead() -> None:
    model = without_statistics()
    with ag.Guide(model, targets="predicted") as guide:
        trainer(model, guide).step(parted(data(), 1))
        with pytest.raises(ag.errors.InputError, match="accumulate no gradients"):
            trainer(model, guide).step(parted(data(), 4))


def test_steps_with_an_intervention() -> None:
    model, plain = without_statistics(), without_statistics()
    batch = data()
    made = trainer(model, ag.Intervention(model, weight=2.0))
    intervention = ag.Intervention(plain, weight=2.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        made.step([batch])
        both = intervention(batch.images, batch.labels, mask=batch.annotations["mask"])
        optimizer.zero_grad()
        (F.cross_entropy(both.swapped, batch.labels) + both.loss).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain))


def test_unknown_labels_do_not_count() -> None:
    model, plain = without_statistics(), without_statistics()
    batch = data(6)
    labels = F.one_hot(batch.labels, 3).float()
    labels[0, 1] = labels[3] = math.nan
    trainer(model, None).step(parted(Batch(batch.images, labels, batch.annotations), 2))
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(plain(batch.images)[known], labels[known])
    loss.backward()
    torch.optim.SGD(plain.parameters(), lr=0.05).step()
    torch.testing.assert_close(weights(model), weights(plain))


def test_measuring_changes_nothing() -> None:
    model, other = without_statistics(), without_statistics()
    for one, measured in ((model, True), (other, False)):
        one.train()
        with ag.Guide(one, terms=[ag.Term(loss="outside", warmup=4, targets="all", max_classes=1)]) as guide:
            made = trainer(one, guide)
            for _ in range(3):
                made.step([data()])
                if measured:
                    found = made.measure([data(8)], swapped=SwappedAccuracy(one))
                    assert one.training
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=0)
    assert found.swapped is not None
    assert found.energy is not None
    assert 0 <= found.energy <= 1
    assert found.accuracy is not None


def test_swapped_images_are_gathered_into_full_batches() -> None:
    """Twelve images in batches of 2 are measured as one of four and one of eight."""
    model = without_statistics()
    seen: list[int] = []

    class Counting(SwappedAccuracy):
        def update(self, images: Tensor, labels: Tensor, masks: Tensor) -> None:
            seen.append(len(images))
            super().update(images, labels, masks)

    made = trainer(model, None)
    made.measure(parted(data(sparse=False), 6), swapped=Counting(model), batch_size=4)
    assert seen == [4, 8] or seen == [4, 4, 4]
    assert sum(seen) == 12


def test_state_goes_on() -> None:
    model = without_statistics()
    batch = data()
    with ag.Guide(model, terms=[ag.Term(loss="outside", warmup=8)]) as guide:
        made = trainer(model, guide)
        made.step([batch])
        state, before = copy.deepcopy(made.state_dict()), weights(model)
        made.step([batch])
        expected = weights(model)
        made.load_state_dict(state)
        assert torch.equal(weights(model), before)
        made.step([batch])
    assert torch.equal(weights(model), expected)


def test_a_loss_that_is_not_finite() -> None:
    model = without_statistics()
    batch = data(4)
    batch.images[0, 0, 0, 0] = math.inf
    with pytest.raises(GuidanceError, match="not finite in epoch 1, step 1"):
        trainer(model, None).step([batch])


def test_reduced_precision() -> None:
    model = without_statistics()
    with ag.Guide(model, loss="outside") as guide:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        made = Trainer(model, optimizer, accelerator_on(torch.device("cpu"), "bf16"), guide)
        before = weights(model)
        made.step([data()])
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), before)
    assert accelerator_on(torch.device("cpu"), "no").mixed_precision == "no"


def test_without_accelerate_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match=r"training needs accelerate.*attnguide\[train\]"):
        accelerator_on()
