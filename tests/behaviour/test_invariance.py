"""What λ means does not depend on the batch size or on the size of the masks."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import batch, cnn
from tests.helpers.parts import standard
from torch.nn.functional import interpolate

import attnguide as ag
from attnguide.parts.registry import registry

LOSSES = standard("loss")
#: Those that compare maps with a prior.
COMPARING = [name for name in LOSSES if registry().create("loss", name, ag.AlignmentLoss).reads_prior]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("source", ["grad_cam", "layer_attention"])
def test_batches_of_4_or_64_give_the_same_loss(loss: str, source: str) -> None:
    model = cnn().eval()
    images, labels, masks = batch(64)
    guide = ag.Guide(model, source=source, loss=loss)
    model(images)
    read = {"mask": masks} if loss in COMPARING else {}
    whole = guide.loss(labels, **read)
    parts = []
    for start in range(0, 64, 4):
        part = slice(start, start + 4)
        model(images[part])
        given = {name: value[part] for name, value in read.items()}
        parts.append(guide.loss(labels[part], **given).detach())
    assert float(whole.detach()) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-5)


@pytest.mark.parametrize("loss", COMPARING)
def test_masks_of_64_or_128_pixels_give_the_same_loss(loss: str) -> None:
    model = cnn().eval()
    images, labels, _ = batch(8, 64)
    yy, xx = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    disc = (((yy - 57) ** 2 + (xx - 70) ** 2) < 33**2).float()
    small = (interpolate(disc[None, None], 64, mode="nearest-exact")[0, 0] > 0.5).float()
    guide = ag.Guide(model, loss=loss)
    model(images)
    values = [float(guide.loss(labels, mask=mask).detach()) for mask in (small, disc)]
    assert values[0] == pytest.approx(values[1], rel=0.05)


@pytest.mark.parametrize("loss", COMPARING)
def test_the_same_maps_at_twice_the_resolution_give_the_same_loss(loss: str) -> None:
    made = registry().create("loss", loss, ag.AlignmentLoss)
    maps, prior = torch.rand(4, 8, 8), torch.rand(4, 8, 8)
    twice = [tensor.repeat_interleave(2, 1).repeat_interleave(2, 2) for tensor in (maps, prior)]
    torch.testing.assert_close(made(*twice), made(maps, prior), rtol=1e-4, atol=1e-5)


def test_weights_are_linear_and_terms_add_up() -> None:
    model = cnn().eval()
    images, labels, masks = batch(4)
    terms = [ag.Term(loss="cosine", weight=0.3), ag.Term(loss="mse", weight=2.0)]
    with ag.Guide(model, terms=terms) as both:
        model(images)
        total = both.loss(labels, mask=masks)
        records = both.records()
    means = [float(record.losses.mean()) for record in records]
    assert float(total.detach()) == pytest.approx(0.3 * means[0] + 2.0 * means[1], rel=1e-5)
    terms[0].weight = 0.0
    with ag.Guide(model, terms=terms) as second:
        model(images)
        assert float(second.loss(labels, mask=masks).detach()) == pytest.approx(2.0 * means[1], rel=1e-5)
        terms[1].weight = 1.0  # while training
        assert float(second.loss(labels, mask=masks).detach()) == pytest.approx(means[1], rel=1e-5)


def test_maps_of_several_classes_weigh_like_samples() -> None:
    model = cnn().eval()
    images, _, masks = batch(4)
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    guide = ag.Guide(model)
    model(images)
    value = guide.loss(labels.float(), mask=masks)
    (record,) = guide.records()
    assert list(zip(record.pairs.sample.tolist(), record.pairs.cls.tolist(), strict=True)) == [
        (0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (3, 0),
    ]  # fmt: skip
    assert float(value.detach()) == pytest.approx(float(record.losses.mean()), rel=1e-6)
    singles = []
    for sample, cls in zip(record.pairs.sample.tolist(), record.pairs.cls.tolist(), strict=True):
        one = torch.zeros(4, 4)
        one[sample, cls] = 1
        singles.append(float(guide.loss(one, mask=masks).detach()))
    assert singles == pytest.approx(record.losses.tolist(), rel=1e-5)


def test_warming_up_lets_the_weight_grow_step_by_step() -> None:
    model = cnn().eval()
    images, labels, masks = batch(4)
    with ag.Guide(model, weight=2.0) as plain, ag.Guide(model, terms=[ag.Term(weight=2.0, warmup=4)]) as warm:
        for share in (0.25, 0.5, 0.75, 1.0, 1.0):
            model(images)
            whole, found = (float(guide.loss(labels, mask=masks).detach()) for guide in (plain, warm))
            assert found == pytest.approx(share * whole, rel=1e-5)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ag.AttnGuideError, match="warmup"):
            ag.Guide(model, terms=[ag.Term(warmup=wrong)])  # type: ignore[arg-type]
