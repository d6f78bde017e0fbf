"""Guidance by intervention, against linear models whose dependence on the outside is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import jensenshannon
from tests.helpers.models import Wrapped, batch, cnn, smooth_cnn, tiny_vit
from tests.helpers.processes import run_in_processes
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import GuidanceError, InputError, LayerError
from attnguide.masks import SwapOutside
from attnguide.testing import hooks

CLASSES, SIDE = 3, 8


class Linear(nn.Module):
    """Logits that are linear in the pixels of images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", images, self.weight)


def data(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    masks = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    masks[2:5, 3:7] = 1
    return torch.randn(size, 1, SIDE, SIDE).double(), torch.arange(size) % CLASSES, masks


@pytest.mark.parametrize("divergence", ["js", "kl", "logits"])
def test_the_loss_is_zero_exactly_where_the_outside_has_no_effect(divergence: str) -> None:
    images, labels, mask = data()
    weight = torch.randn(CLASSES, 1, SIDE, SIDE).double()
    inside = ag.Intervention(Linear(weight * mask), divergence=divergence)(images, labels, mask=mask)
    assert inside.loss.item() == pytest.approx(0.0, abs=1e-14)
    torch.testing.assert_close(inside.logits, inside.swapped)
    leaking = weight * mask
    leaking[0, 0, 0, 0] = 0.5
    assert ag.Intervention(Linear(leaking), divergence=divergence)(images, labels, mask=mask).loss > 1e-4


def test_what_all_logits_have_in_common_does_not_count() -> None:
    images, labels, mask = data()
    common = torch.randn(1, 1, SIDE, SIDE).double().expand(CLASSES, -1, -1, -1).clone()
    for divergence in ("js", "kl", "logits"):
        term = ag.Intervention(Linear(common), divergence=divergence)
        assert term(images, labels, mask=mask).loss.item() == pytest.approx(0.0, abs=1e-12)
        # Of classes that are predicted by themselves it does.
        positives = torch.nn.functional.one_hot(labels).double()
        assert term(images, positives, mask=mask).loss > 1e-3


def test_the_loss_is_the_mean_divergence_of_the_exchanged_images() -> None:
    images, labels, mask = data()
    model = Linear(torch.randn(CLASSES, 1, SIDE, SIDE).double() / 4)
    both = ag.Intervention(model, weight=3.0)(images, labels, mask=[mask] * 4 + [None] * 2)
    assert both.batch.exchanged.tolist() == [True] * 4 + [False] * 2
    first, second = (logits.softmax(dim=1).detach().numpy() for logits in (both.logits, both.swapped))
    expected = 3 * np.mean(jensenshannon(first, second, axis=1)[:4] ** 2)
    assert both.loss.item() == pytest.approx(expected)
    torch.testing.assert_close(both.logits[4:], both.swapped[4:])
    # What was exchanged is what the model saw.
    torch.testing.assert_close(model(both.batch.images), both.swapped)


def test_classes_that_are_predicted_by_themselves_are_compared_one_by_one() -> None:
    images, labels, mask = data()
    positives = torch.nn.functional.one_hot(labels).double()
    model = Linear(torch.randn(CLASSES, 1, SIDE, SIDE).double() / 4)
    both = ag.Intervention(model, weight=2.0)(images, positives, mask=mask)
    first, second = (logits.sigmoid().detach().numpy() for logits in (both.logits, both.swapped))
    apart = [jensenshannon([p, 1 - p], [q, 1 - q]) ** 2 for p, q in zip(first.flat, second.flat, strict=True)]
    assert both.loss.item() == pytest.approx(2 * np.mean(apart))


def test_one_logit_is_one_class_predicted_by_itself() -> None:
    images, _, mask = data()
    present = torch.tensor([0.0, 1, 1, 0, 1, 0]).double()
    model = Linear(torch.randn(1, 1, SIDE, SIDE).double() / 4)
    both = ag.Intervention(model, divergence="kl")(images, present, mask=mask)
    p, q = (logits.sigmoid().detach()[:, 0] for logits in (both.logits, both.swapped))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert both.loss.item() == pytest.approx(expected.mean().item())


@pytest.mark.parametrize("divergence", ["js", "kl", "logits"])
def test_the_gradient_is_that_of_finite_differences(divergence: str) -> None:
    images, labels, mask = data()
    images = images.expand(-1, 3, -1, -1)
    model = smooth_cnn(CLASSES).double()
    term = ag.Intervention(model, weight=2.0, divergence=divergence)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loss(**changed: Tensor) -> Tensor:
        for name, weight in model.named_parameters():
            weight.data = changed.get(name.replace(".", "_"), weights[name])
        term._steps = 0  # the same partners each time
        return term(images, labels, mask=mask).loss

    loss().backward()
    for name, weight in [*model.named_parameters()]:
        assert weight.grad is not None
        gradient = weight.grad.clone()
        direction, step = torch.randn_like(gradient), 1e-5
        key = name.replace(".", "_")
        ahead = loss(**{key: weights[name] + step * direction})
        behind = loss(**{key: weights[name] - step * direction})
        slope = ((ahead - behind) / (2 * step)).item()
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_without_a_mask_the_loss_is_an_exact_zero_with_a_graph() -> None:
    images, labels, _ = batch()
    model = cnn()
    both = ag.Intervention(model)(images, labels, mask=None)
    assert both.loss.item() == 0
    both.loss.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_nothing_is_left_on_the_model_and_no_random_number_is_taken() -> None:
    images, labels, masks = batch()
    model = cnn()
    state, before = torch.get_rng_state(), hooks(model)
    term = ag.Intervention(model)
    partners = [term(images, labels, mask=masks).batch.partner.tolist() for _ in range(20)]
    assert hooks(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(each) for each in partners}) > 1
    again = ag.Intervention(model)
    assert [again(images, labels, mask=masks).batch.partner.tolist() for _ in range(20)] == partners


def test_the_logits_may_be_part_of_an_output_and_autocast_may_be_on() -> None:
    images, labels, masks = batch()
    model = Wrapped(lambda logits, images: {"scores": logits, "images": images})
    with torch.autocast("cpu", torch.bfloat16):
        both = ag.Intervention(model, logits="scores")(images, labels, mask=masks)
    assert both.loss.dtype == torch.float32
    both.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_outside_comes_from_another_label_unless_asked_otherwise() -> None:
    images, labels, mask = data(24)
    other = ag.Intervention(cnn(CLASSES).double())
    partner = other(images.expand(-1, 3, -1, -1), labels, mask=mask).batch.partner
    assert bool((labels[partner] != labels).all())
    drawn = ag.Intervention(cnn(CLASSES).double(), swap=SwapOutside())
    partner = drawn(images.expand(-1, 3, -1, -1), labels, mask=mask).batch.partner
    assert bool((labels[partner] == labels).any())


def test_features_of_a_layer_are_exchanged_as_by_hand() -> None:
    images, labels, masks = batch(6)
    model = cnn().eval()
    term = ag.Intervention(model, layer="block2")
    both = term(images, labels, mask=masks)
    assert torch.equal(both.batch.images, images)
    torch.testing.assert_close(both.logits, model(images))
    names = [name for name, _ in model.named_children()]
    first = nn.Sequential(*[part for name, part in model.named_children() if name <= "block2"])
    rest = [name for name in names if not name <= "block2"]
    feature = first(images)
    inside = torch.nn.functional.interpolate(masks[:, None], feature.shape[-2:], mode="area")
    known = inside == 0
    partner = both.batch.partner
    # What lies outside of both masks comes from the partner, untouched.
    exchanged = _captured(model, rest[0], lambda: term(images, labels, mask=masks))[len(images) :]
    again = ag.Intervention(model, layer="block2")
    again(images, labels, mask=masks)
    generator_partner = again(images, labels, mask=masks).batch.partner
    clean = (known & known[generator_partner]).expand_as(feature)
    torch.testing.assert_close(exchanged[clean], feature[generator_partner][clean])
    whole = (inside == 1).expand_as(feature)
    torch.testing.assert_close(exchanged[whole], feature[whole])
    assert bool((labels[partner] != labels).all())


def _captured(model: nn.Module, name: str, run: Any) -> Tensor:
    """What a module is given."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    run()
    handle.remove()
    return found[-1]


@pytest.mark.parametrize("layer", ["patch_embed", "blocks.0", "stage:0"])
def test_features_of_patches_are_exchanged_and_the_class_token_stays(layer: str) -> None:
    images, labels, masks = batch()
    model = tiny_vit()
    both = ag.Intervention(model, layer=layer)(images, labels, mask=masks)
    torch.testing.assert_close(both.logits, model(images))
    assert not torch.equal(both.logits, both.swapped)
    both.loss.backward()
    assert bool(model.patch_embed.proj.weight.grad.any())  # type: ignore[union-attr, operator]


def test_the_local_layer_is_found_with_the_first_images_and_kept() -> None:
    images, labels, masks = batch()
    images, masks = (nn.functional.interpolate(each, size=(64, 64)) for each in (images, masks[:, None]))
    model = cnn()
    term = ag.Intervention(model, layer="local")
    assert "at local" in repr(term)
    both = term(images, labels, mask=masks)
    assert term.layer == "block1"
    named = ag.Intervention(model, layer="block1")(images, labels, mask=masks)
    torch.testing.assert_close(both.loss, named.loss)
    resumed = ag.Intervention(model, layer="local")
    resumed.load_state_dict(term.state_dict())
    assert resumed.layer == "block1"
    after, expected = (each(images, labels, mask=masks) for each in (resumed, term))
    assert torch.equal(after.batch.partner, expected.batch.partner)
    with pytest.raises(InputError, match="layer of the state is None"):
        resumed.load_state_dict({"step": 1})
    with pytest.raises(LayerError, match="block9"):
        resumed.load_state_dict({"step": 1, "layer": "block9"})


def test_without_a_local_layer_images_are_exchanged() -> None:
    images, labels, masks = batch()
    term = ag.Intervention(tiny_vit(), layer="local")
    term(images, labels, mask=masks)
    assert term.layer == "input"
    assert ag.Intervention(nn.DataParallel(cnn()), layer="local").layer == "input"


def test_images_without_a_mask_run_once() -> None:
    images, labels, masks = batch()
    model = cnn().eval()
    given: list[int] = []
    model.register_forward_pre_hook(lambda module, args: given.append(len(args[0])))
    some = [masks[0], None, masks[2], masks[3]]
    for layer in ("input", "block1"):
        both = ag.Intervention(model, layer=layer)(images, labels, mask=some)
        torch.testing.assert_close(both.swapped[1], both.logits[1])
        assert bool((both.swapped[0] != both.logits[0]).any())
    assert given[0] == 7


def test_a_layer_that_not_all_passes_through_is_refused_and_nothing_is_left() -> None:
    images, labels, masks = batch()
    model = timm.create_model("test_resnet", num_classes=4)
    before = hooks(model)
    with pytest.raises(GuidanceError, match=r"layer 'layer2.0.conv1'.*stage:1"):
        ag.Intervention(model, layer="layer2.0.conv1")(images, labels, mask=masks)
    assert hooks(model) == before
    with pytest.raises(LayerError, match="no layer 'layer9'"):
        ag.Intervention(model, layer="layer9")
    with pytest.raises(InputError, match="DistributedDataParallel"):
        ag.Intervention(nn.DataParallel(cnn()), layer="block1")


def test_the_recipe() -> None:
    term = ag.Intervention.from_recipe(cnn())
    assert (term.weight, term.divergence, term.swap, term.layer) == (
        10.0,
        "js",
        SwapOutside("other"),
        "local",
    )
    assert ag.Intervention.from_recipe(cnn(), "right-for-real", weight=2.0, layer="block1").weight == 2.0
    with pytest.raises(InputError, match=r"no setting 'wieght'.*weight"):
        ag.Intervention.from_recipe(cnn(), wieght=1.0)
    with pytest.raises(InputError, match=r"'rrr' compares maps.*Guide.from_recipe"):
        ag.Intervention.from_recipe(cnn(), "rrr")
    with pytest.raises(InputError, match=r"right-for-real.*Intervention.from_recipe"):
        ag.Guide.from_recipe(cnn(), "right-for-real")


def test_a_shortcut_outside_is_unlearned() -> None:
    """The outside says the class clearly, the object less so; guided, the classifier uses the object."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    sign = (2.0 * labels - 1)[:, None, None, None]
    mask = torch.zeros(SIDE, SIDE)
    mask[2:6, 2:6] = 1
    images = torch.randn(64, 1, SIDE, SIDE) + sign * (0.3 * mask + 3.0 * (mask == 0))
    found = {}
    for weight in (0.0, 10.0):
        model = Linear(torch.zeros(2, 1, SIDE, SIDE))
        term = ag.Intervention(model, weight=weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            both = term(images, labels, mask=mask)
            loss = torch.nn.functional.cross_entropy(both.logits, labels) + both.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reversed_outside = images - 2 * sign * 3.0 * (mask == 0)
        found[weight] = (model(reversed_outside).argmax(dim=1) == labels).float().mean().item()
    assert found[0.0] < 0.1
    assert found[10.0] > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"divergence": "jsd"}, "divergence='jsd' is unknown: js, kl, logits"),
        ({"seed": -1}, "seed=-1"),
        ({"swap": "any"}, "swap='any'"),
        ({"logits": 1.5}, "logits=1.5"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ag.Intervention(cnn(), **settings)


def test_a_pass_without_a_graph_and_a_model_that_is_none_are_refused() -> None:
    images, labels, masks = batch()
    with torch.no_grad(), pytest.raises(GuidanceError, match="no graph"):
        ag.Intervention(cnn())(images, labels, mask=masks)
    with pytest.raises(InputError, match="must be a torch"):
        ag.Intervention("cnn")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels out of range"):
        ag.Intervention(cnn())(images, labels + 100, mask=masks)


def test_repr_says_what_it_does() -> None:
    term = ag.Intervention(cnn(), weight=4, swap=SwapOutside("any"))
    assert repr(term).endswith(": js × 4)")


WORK = """
def work(rank, world):
    import attnguide as ag
    from attnguide import functional
    from tests.helpers.models import batch, cnn

    torch.manual_seed(0)
    model = DDP(cnn())  # batch normalization, whose buffers the wrapper sends around before each pass
    images, labels, masks = batch(8)
    part = slice(rank * 4, rank * 4 + 4)
    mask = masks[part] if rank == 0 else [masks[4], masks[5], None, None]
    term = ag.Intervention(model, weight=2.0)
    for step in range(2):
        model.zero_grad()
        both = term(images[part], labels[part], mask=mask)
        both.loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert all(same(gradient) for gradient in found)

    # The mean over the six of both processes, from what each of them compared.
    apart = functional.divergence(both.logits, both.swapped).detach()[both.batch.exchanged].sum()
    count = both.batch.exchanged.sum().float()
    dist.all_reduce(apart)
    dist.all_reduce(count)
    assert count.item() == 6
    mean = both.loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, 2.0 * apart / count)
    # One without any mask still takes part.
    term(images[part], labels[part], mask=masks[part] if rank == 0 else None).loss.backward()
"""


@pytest.mark.slow
def test_the_mean_is_that_of_all_processes(tmp_path: Path) -> None:
    run_in_processes(WORK, tmp_path, 2)
