"""What is left of a class without what its map covers, by loops written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import Wrapped, batch, cnn, tiny_vit
from tests.helpers.processes import run_in_processes
from torch import Tensor, nn
from torch.nn import functional as F

import attnguide as ag
from attnguide.errors import GuidanceError, InputError
from attnguide.losses import Erase
from attnguide.sources import GradCAM

IMAGES, LABELS, MASKS = batch()


def by_hand(model: nn.Module, layer: str, images: Tensor, labels: Tensor) -> Tensor:
    """Grad-CAM, soft mask, and the model again; the probability that is left of each label."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *given: kept.append(given[2]))
    logits = model(images)
    handle.remove()
    scores = logits[torch.arange(len(labels)), labels].sum()
    (gradient,) = torch.autograd.grad(scores, kept[0], create_graph=True)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1).clamp(min=0)
    peaks = [each.max() if each.max() > 0 else torch.tensor(1.0) for each in cam]
    cam = cam / torch.stack(peaks)[:, None, None]
    sized = F.interpolate(cam[:, None], images.shape[-2:], mode="bilinear")
    left = model(images - images / (1 + torch.exp(-10 * (sized - 0.5))))
    return left.softmax(dim=1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_those_of_a_plain_loop(training: bool) -> None:
    model = cnn().train(training)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)  # so that the maps show something
    weights = dict(model.named_parameters())
    if training:
        twin = cnn().train()
        twin.load_state_dict(model.state_dict())
        losses = by_hand(twin, "block3", IMAGES, LABELS)
        expected = torch.autograd.grad(losses.mean(), list(twin.parameters()), allow_unused=True)
    else:
        total = [torch.zeros_like(weight) for weight in weights.values()]
        losses = torch.empty(0)
        for image, label in zip(IMAGES, LABELS, strict=True):
            loss = by_hand(model, "block3", image[None], label[None])
            losses = torch.cat([losses, loss.detach()])
            for sum_, gradient in zip(
                total, torch.autograd.grad(loss[0], list(weights.values())), strict=True
            ):
                sum_ += gradient / len(IMAGES)
        expected = tuple(total)
    with ag.Guide(model, source=GradCAM(relu=False), loss="erase", layer="block3") as guide:
        model(IMAGES)
        found = guide.loss(LABELS)
        torch.testing.assert_close(found, losses.detach().mean())
        torch.testing.assert_close(guide.records()[0].losses, losses.detach())
        gradients = torch.autograd.grad(found, list(weights.values()), allow_unused=True)
    for name, one, other in zip(weights, gradients, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)


def test_a_map_that_covers_the_evidence_leaves_nothing_of_the_class() -> None:
    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            evidence = 10 * images[:, 0, :4, :4].mean(dim=(1, 2))
            return torch.stack([evidence, torch.zeros_like(evidence)], dim=1)

    images = torch.ones(1, 3, 8, 8)
    trace = ag.Trace(images, Bright()(images), {}, model=Bright())
    corner = torch.zeros(1, 8, 8)
    corner[:, :4, :4] = 1
    pairs = ag.Pairs.one_each(torch.tensor([0]))
    sharp = Erase(steepness=100)
    assert float(sharp.compare(corner, corner, trace, pairs)) == pytest.approx(0.5)
    whole = torch.tensor(10.0).sigmoid()
    assert float(sharp.compare(1 - corner, corner, trace, pairs)) == pytest.approx(float(whole), abs=1e-4)
    soft = float(Erase(threshold=0.4, steepness=3).compare(corner, corner, trace, pairs))
    left = 1 - torch.sigmoid(torch.tensor(3 * 0.6))
    assert soft == pytest.approx(float(torch.sigmoid(10 * left)), abs=1e-5)


def test_the_second_pass_leaves_statistics_random_numbers_and_hooks() -> None:
    model = nn.Sequential(cnn(), nn.Dropout(0.5)).train()
    with ag.Guide(model, source="cam", loss="erase", layer="0.block3") as guide:
        model(IMAGES)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        guide.loss(LABELS)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert guide.check(IMAGES, LABELS).reached


def test_other_outputs_and_attributes() -> None:
    torch.manual_seed(0)
    model = Wrapped(lambda logits, images: {"aside": images, "logits": logits}).eval()
    hot = torch.tensor([[1.0, 0, 1, 0]] * 4)
    with ag.Guide(model, source="cam", loss=Erase(probability="sigmoid")) as guide:
        logits = model(IMAGES)["logits"]
        guide.loss(hot)
        (record,) = guide.records()
    assert len(record.pairs) == 8
    erased = ag.functional.erase(IMAGES[record.pairs.sample], record.maps)
    with torch.no_grad():
        expected = model(erased)["logits"][torch.arange(8), record.pairs.cls].sigmoid()
    torch.testing.assert_close(record.losses, expected)
    assert logits.shape == (4, 4)


def test_what_is_wrong_is_named() -> None:
    settings: tuple[tuple[dict[str, Any], str], ...] = (
        ({"threshold": 2}, "threshold=2"),
        ({"steepness": 0}, "steepness=0"),
        ({"probability": "softmaks"}, "probability='softmaks'.*Did you mean 'softmax'"),
    )
    for setting, message in settings:
        with pytest.raises(InputError, match=message):
            Erase(**setting)
    with pytest.raises(GuidanceError, match="not on maps alone"):
        Erase()(MASKS, MASKS)
    with pytest.raises(InputError, match="reads no prior; leave prior='boxes' out"):
        ag.Guide(cnn(), prior="boxes", loss="erase")
    model = cnn(classes=1).eval()
    with ag.Guide(model, source="cam", loss="erase") as guide:
        model(IMAGES)
        with pytest.raises(InputError, match="no prior of this guide reads mask="):
            guide.loss(torch.ones(4, 1), mask=MASKS)
        with pytest.raises(InputError, match="one logit"):
            guide.loss(torch.ones(4, 1))


WHOLE_BATCH = """
def work(rank, world):
    import attnguide as ag
    from tests.helpers.models import batch, cnn

    torch.manual_seed(0)
    model = DDP(cnn())
    images, labels, _ = batch(8)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    guide = ag.Guide(model, source="cam", loss="erase")
    for training in (True, False):  # in training mode the wrapper sends buffers around
        model.train(training)
        model.zero_grad()
        logits = model(images[part])
        (torch.nn.functional.cross_entropy(logits, labels[part]) + guide.loss(labels[part])).backward()
    guide.remove()
    alone = model.module
    found = {name: p.grad.clone() for name, p in alone.named_parameters()}
    alone.zero_grad()
    guide = ag.Guide(alone, source="cam", loss="erase")
    logits = alone(images)
    (torch.nn.functional.cross_entropy(logits, labels) + guide.loss(labels)).backward()
    for name, p in alone.named_parameters():
        assert same(found[name]), name
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
"""


@pytest.mark.slow
def test_several_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    run_in_processes(WHOLE_BATCH, tmp_path)


def test_transformers_checkpointing_and_reduced_precision() -> None:
    torch.manual_seed(0)
    model = tiny_vit().train()
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with ag.Guide(model, source="hires_cam", loss="erase") as guide:
            model(IMAGES)
            guide.loss(LABELS).backward()  # type: ignore[no-untyped-call]
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)
    model.set_grad_checkpointing(False)
    with ag.Guide(model, source="hires_cam", loss="erase") as guide:
        with torch.autocast("cpu", torch.bfloat16):
            model(IMAGES)
            loss = guide.loss(LABELS)
        assert loss.dtype == torch.float32
        assert 0 < float(loss.detach()) < 1
