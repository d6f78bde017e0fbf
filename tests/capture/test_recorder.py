"""What the library runs for itself does not come between a forward pass and its guidance loss."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit

import attnguide as ag
from attnguide.testing import hooks


def test_explain_and_check_between_forward_and_loss() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    expected = float(guide.loss(labels, mask=masks).detach())
    model(images)
    ag.explain(model, images[:2])
    guide.check(images[:3], labels[:3], mask=masks[:3])
    with pytest.raises(ag.AttnGuideError):
        ag.explain(model, images[:1], layer="head")  # the error message runs a probe
    loss = guide.loss(labels, mask=masks)
    assert float(loss.detach()) == expected
    loss.backward()
    assert float(model.block1[0].weight.grad.abs().sum()) > 0


def test_the_probe_of_an_error_message_does_not_replace_the_forward() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    wrong, right = ag.Guide(model, layer="head"), ag.Guide(model)
    for _ in range(2):
        with pytest.raises(ag.AttnGuideError, match=r"layer 'head'.*block4"):
            model(images)
    wrong.remove()
    model(images)
    with pytest.raises(ag.AttnGuideError, match="layer 'head'"):
        ag.explain(model, images, layer="head")
    right.loss(labels, mask=masks)


def test_explain_within_autocast_does_not_cut_the_training_step_off() -> None:
    model = cnn()
    images, _, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        ag.explain(model, images, layer="block4")
        loss = model(images).float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_a_copy_of_a_guided_model_is_not_guided(build) -> None:
    model = build().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    expected = float(guide.loss(labels, mask=masks).detach())
    twin = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, averaged, loaded):
        torch.testing.assert_close(other(images[:2]), model(images[:2]))
        with torch.no_grad():
            other(images[:1])
    model(images)
    twin(images[:2])
    assert float(guide.loss(labels, mask=masks).detach()) == expected
    ag.explain(twin, images)
    with ag.Guide(twin) as second:
        twin(images)
        assert float(second.loss(labels, mask=masks).detach()) == pytest.approx(expected, rel=1e-6)
    guide.remove()
    assert not hooks(model)
