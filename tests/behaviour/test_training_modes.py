"""Guidance in the ways that people train."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from tests.helpers.models import CLASSES, Wrapped, batch, cnn, tiny_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnguide as ag
from attnguide.capture.logits import find_logits, replace_logits
from attnguide.capture.recorder import Shard
from attnguide.pairs import resolve
from attnguide.testing import process
from attnguide.trace import trace_of


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def step(model: nn.Module, guide: ag.Guide, size: int = 4, side: int = 32) -> Tensor:
    images, labels, masks = batch(size, side)
    output = model(images)
    loss = nn.functional.cross_entropy(find_logits(output).float(), labels) + guide.loss(labels, mask=masks)
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------- precision, modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_autocast_on_the_cpu(dtype: torch.dtype, build: Any) -> None:
    model = build().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    expected = float(guide.loss(labels, mask=masks).detach())
    with torch.autocast("cpu", dtype):
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels) + guide.loss(labels, mask=masks)
        assert torch.is_autocast_enabled("cpu")
        inside = float(guide.loss(labels, mask=masks).detach())
    assert logits.dtype == dtype
    outside = guide.loss(labels, mask=masks)  # leaving the block first is as good
    assert outside.dtype == torch.float32
    assert guide.records()[0].maps.dtype == torch.float32
    assert inside == pytest.approx(expected, rel=0.1)
    assert float(outside.detach()) == pytest.approx(inside, rel=1e-5)
    loss.backward()
    found = gradients(model)
    assert all(g is None or bool(g.isfinite().all()) for g in found.values())
    assert any(g is not None and bool(g.any()) for g in found.values())


def test_whole_model_in_bfloat16() -> None:
    model = cnn().to(torch.bfloat16).eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images.bfloat16())
    loss = guide.loss(labels, mask=masks)
    assert loss.dtype == torch.float32
    loss.backward()
    assert bool(model.block1[0].weight.grad.isfinite().all())


def test_gradient_accumulation_adds_up() -> None:
    model = cnn().eval()
    guide = ag.Guide(model)
    images, labels, masks = batch(8)
    losses = []
    for part in (slice(0, 4), slice(4, 8)):
        model(images[part])
        loss = guide.loss(labels[part], mask=masks[part]) / 2
        loss.backward()
        losses.append(loss.detach())
    accumulated = gradients(model)
    model(images)
    whole = guide.loss(labels, mask=masks)
    whole.backward()
    assert float(whole.detach()) == pytest.approx(float(sum(losses)), rel=1e-5)
    for name, gradient in gradients(model).items():
        if gradient is not None:
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_losses_of_several_forwards_in_one_backward() -> None:
    model = cnn().eval()
    guide = ag.Guide(model)
    images, labels, masks = batch(8)
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 8)):
        model(images[part])
        total = total + guide.loss(labels[part], mask=masks[part]) / 2
    total.backward()
    assert bool(model.block1[0].weight.grad.any())


def test_training_mode_updates_buffers_once_and_evaluation_mode_does_not() -> None:
    model = cnn()
    guide = ag.Guide(model)
    step(model, guide)
    assert int(model.block1[1].num_batches_tracked) == 1  # the search for the layer left no trace
    model.eval()
    step(model, guide)
    assert int(model.block1[1].num_batches_tracked) == 1
    assert not model.training


def test_memory_format_does_not_matter() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    expected = guide.loss(labels, mask=masks).detach()
    model.to(memory_format=torch.channels_last)
    model(images.to(memory_format=torch.channels_last))
    loss = guide.loss(labels, mask=masks)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_leaves_the_head_to_be_guided() -> None:
    model = cnn().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    guide = ag.Guide(model)
    images, labels, masks = batch()
    report = guide.check(images, labels, mask=masks)
    assert report.reached == ["head"]
    model(images)
    guide.loss(labels, mask=masks).backward()
    found = gradients(model)
    assert [name for name, g in found.items() if g is not None] == ["head.weight", "head.bias"]
    assert bool(found["head.weight"].any())
    assert not bool(found["head.bias"].any())  # a constant does not change where the model looks


def test_guidance_lowers_its_loss() -> None:
    model = cnn(width=8)
    guide = ag.Guide(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    images, labels, masks = batch(8)
    for _ in range(40):
        optimiser.zero_grad()
        logits = model(images)
        guidance = guide.loss(labels, mask=masks)
        (nn.functional.cross_entropy(logits, labels) + guidance).backward()
        optimiser.step()
        losses.append(float(guidance.detach()))
    assert losses[-1] < 0.6 * losses[0]


# --------------------------------------------------------------------- outputs


Pair = namedtuple("Pair", ["loss", "scores"])
Named = namedtuple("Named", ["logits", "aux_logits"])


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


PACKS = {
    "tuple": lambda logits, images: (logits, images),
    "features first": lambda logits, images: [images, logits],
    "loss first": lambda logits, images: Pair(logits.sum(), logits),
    "named tuple with logits": lambda logits, images: Named(logits, logits * 0),
    "dict": lambda logits, images: {"images": images, "logits": logits},
    "dict by another name": lambda logits, images: {"images": images, "scores": logits},
    "ordered dict": lambda logits, images: OrderedDict(logits=logits),
    "dataclass": lambda logits, images: Output(logits),
    "object": lambda logits, images: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("name", PACKS)
def test_outputs_of_every_kind(name: str) -> None:
    plain = cnn().eval()
    images, labels, masks = batch()
    with ag.Guide(plain) as guide:
        plain(images)
        expected = float(guide.loss(labels, mask=masks).detach())
    model = Wrapped(PACKS[name]).eval()
    model.body.load_state_dict(plain.state_dict())
    with ag.Guide(model) as guide:
        output = model(images)
        assert type(output) is type(PACKS[name](torch.zeros(1, CLASSES), images))
        assert float(guide.loss(labels, mask=masks).detach()) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(ag.explain(model, images).logits, plain(images).detach())


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("flat", [False, True])
def test_logits_can_be_replaced_in_every_kind_of_output(name: str, flat: bool) -> None:
    old = torch.zeros(3) if flat else torch.zeros(3, CLASSES)
    new = torch.ones(3, 1) if flat else torch.ones(3, CLASSES)
    images = torch.zeros(3, 3, 8, 8)
    replaced = replace_logits(PACKS[name](old, images), new)
    assert type(replaced) is type(PACKS[name](old, images))
    torch.testing.assert_close(find_logits(replaced), new)
    assert replace_logits(old, new).shape == old.shape


def test_images_as_a_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = cnn()

        def forward(self, *, temperature: float, pixel_values: Tensor) -> Tensor:
            return self.body(pixel_values) / temperature

    model = Keyword().eval()
    images, labels, masks = batch()
    with ag.Guide(model, layer="body.block4") as guide:
        model(temperature=2.0, pixel_values=images)
        assert bool(guide.loss(labels, mask=masks).isfinite())


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize("layer", ["auto", "blocks.1", "blocks.0"])
def test_fused_attention_is_differentiated_twice_and_given_back(layer: str) -> None:
    model = tiny_vit(depth=3)
    assert all(block.attn.fused_attn for block in model.blocks)
    before = process()
    guide = ag.Guide(model, layer=layer)
    images, labels, masks = batch()
    model(images)
    assert {**process(), "random": 0} == {**before, "random": 0}
    guide.loss(labels, mask=masks).backward()
    assert {**process(), "random": 0} == {**before, "random": 0}
    assert bool(model.patch_embed.proj.weight.grad.any())
    # The second derivative is at work: attention after the layer gets a gradient as well.
    tail = model.blocks[2].attn.qkv.weight.grad
    assert bool(tail.any())
    fused = gradients(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    model(images)
    guide.loss(labels, mask=masks).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_torchvision_vit_with_its_fresh_zero_head() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=CLASSES
    )
    assert not bool(model.heads.head.weight.any())
    images, labels, masks = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ag.Guide(model) as guide:
        report = guide.check(images, labels, mask=masks)
        assert "heads.head.weight" in report.replaced
        assert "conv_proj" in report.reached
        assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
        with torch.no_grad():
            model.heads.head.weight.normal_()
        step(model, guide)
    assert bool(model.conv_proj.weight.grad.any())


@pytest.mark.parametrize("layer", ["auto", "blocks.1"])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_with_activation_checkpointing(layer: str, training: bool) -> None:
    model = tiny_vit(depth=3).train(training)
    images, labels, masks = batch()
    guide = ag.Guide(model, layer=layer)
    step(model, guide)
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    before = process()
    for _ in range(2):
        step(model, guide)
        assert {**process(), "random": 0} == {**before, "random": 0}
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    # Two passes, one backward.
    total = torch.zeros(())
    for _ in range(2):
        model(images)
        total = total + guide.loss(labels, mask=masks)
    total.backward()
    assert {**process(), "random": 0} == {**before, "random": 0}
    ag.explain(model, images, layer=guide.layers[0])


# ------------------------------------------------------------ unusual networks


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def forward(self, images: Tensor) -> Tensor:
        for name, block in self.body.named_children():
            images = (
                checkpoint(block, images, use_reentrant=False) if name.startswith("block") else block(images)
            )
        return images


def test_a_cnn_with_activation_checkpointing() -> None:
    plain, model = cnn().eval(), Checkpointed().eval()
    model.body.load_state_dict(plain.state_dict())
    with ag.Guide(plain) as guide:
        expected_loss = step(plain, guide)
        expected = gradients(plain)
    for layer in ("auto", "body.block2"):
        with ag.Guide(model, layer=layer) as guide:
            loss = step(model, guide)
        found = gradients(model.body)
        if layer == "auto":
            torch.testing.assert_close(loss, expected_loss)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4"])
def test_in_place_activations(layer: str) -> None:
    def build(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU6(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        ).eval()

    found = []
    for inplace in (False, True):
        model = build(inplace)
        with ag.Guide(model, layer=layer, loss="cosine") as guide:
            loss = step(model, guide)
        found.append((loss, gradients(model), ag.explain(model, batch()[0], layer=layer, size=None).maps))
    torch.testing.assert_close(found[1], found[0])


class Twice(nn.Module):
    """A block that runs twice, with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        self.first = self.block(features)
        self.second = self.block(self.first)
        return self.head(self.second.mean(dim=(2, 3)))


def test_of_a_module_that_runs_twice_the_last_run_counts() -> None:
    model = Twice().eval()
    images, labels, masks = batch()
    with ag.Guide(model, layer="block", source="layer_attention") as guide:
        model(images)
        guide.loss(labels, mask=masks).backward()
        torch.testing.assert_close(guide.records()[0].maps, model.second.mean(dim=1).detach())
    with ag.Guide(model, layer="block") as guide:
        step(model, guide)
    found = ag.explain(model, images, layer="block", size=None)
    with torch.no_grad():
        model(images)
    weights = model.head.weight[found.classes[:, 0]] / model.second[0, 0].numel()
    expected = (weights[:, :, None, None] * model.second).sum(dim=1).relu()
    torch.testing.assert_close(found.maps[:, 0], expected.detach())


def test_several_layers_at_once() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    terms = [ag.Term(layer=layer, weight=weight) for layer, weight in (("block4", 1.0), ("block2", 0.5))]
    singles = []
    for term in terms:
        with ag.Guide(model, layer=term.layer) as guide:
            model(images)
            singles.append(float(guide.loss(labels, mask=masks).detach()))
    with ag.Guide(model, terms=terms) as guide:
        model(images)
        loss = guide.loss(labels, mask=masks)
        assert [record.maps.shape[1] for record in guide.records()] == [4, 8]
    assert float(loss.detach()) == pytest.approx(singles[0] + 0.5 * singles[1], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"]
)
def test_small_models_of_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=CLASSES)
    side = model.default_cfg["input_size"][-1]
    images, labels, masks = batch(2, side)
    with ag.Guide(model) as guide:
        report = guide.check(images, labels, mask=masks)
        assert len(report.reached) > 3
        step(model, guide, 2, side)


# --------------------------------------------------------------- several devices


def test_data_parallel_without_devices() -> None:
    model = nn.DataParallel(cnn()).eval()
    images, labels, masks = batch()
    guide = ag.Guide(model, layer="module.block4")
    assert guide.layers == ["block4"]
    for _ in range(2):
        model(images)
        assert bool(guide.loss(labels, mask=masks).isfinite())
    model.module(images[:2])  # the model inside may be called too
    assert bool(guide.loss(labels[:2], mask=masks[:2]).isfinite())
    automatic = ag.Guide(model)
    model(images)
    automatic.loss(labels, mask=masks).backward()
    assert ag.explain(model, images).layer == guide.check(images, labels, mask=masks).layers[0] == "block4"


def test_two_parts_of_a_batch_are_one_pass() -> None:
    model = cnn().eval()
    images = batch(6)[0]
    features: dict[str, Tensor] = {}

    def run(part: Tensor) -> Shard:
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _m, _a, output, name=name: features.update({name: output})
            )
            for name in ("block4", "pool")
        ]
        handles.append(
            model.head.register_forward_pre_hook(
                lambda module, args: features.update({"head:input": args[0], "head:weight": module.weight})
            )
        )
        logits = model(part)
        for handle in handles:
            handle.remove()
        return Shard(part, dict(features), logits)

    layers = ag.layers.find_layers(model, images, "block4")
    whole = trace_of([run(images)], layers, differentiable=True)
    halves = trace_of([run(images[:4]), run(images[4:])], layers, differentiable=True)
    assert len(halves.feature.parts) == 2
    torch.testing.assert_close(halves.images, images)
    torch.testing.assert_close(halves.logits, whole.logits)
    torch.testing.assert_close(halves.feature.spatial, whole.feature.spatial)
    source = ag.registry().create("source", "grad_cam", ag.AttributionSource)
    multi = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    results = []
    for trace in (whole, halves):
        pairs = resolve("labels", trace.logits, multi.float())
        maps = source(trace, pairs)
        (gradient,) = torch.autograd.grad(maps.square().sum(), [model.block1[0].weight])
        results.append((maps.detach(), gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)


class Doubling(ag.Adapter):
    """An adapter that answers in place of the model, and reads an annotation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, trace: ag.Trace) -> Tensor:
        return trace.logits * self.scale + trace.feature.spatial.mean() * 0

    def loss(self, trace: ag.Trace, labels: Tensor, *, concepts: Tensor | None = None) -> Tensor | None:
        return None if concepts is None else (self.scale - concepts).square()


def test_an_adapter_answers_in_place_of_the_model() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    plain = model(images).detach()
    with ag.Guide(model, adapters=[Doubling()]) as guide:
        assert len(list(guide.parameters())) == 1
        torch.testing.assert_close(model(images).detach(), 2 * plain)
        loss = guide.loss(labels, mask=masks)
        with_concepts = guide.loss(labels, mask=masks, concepts=torch.tensor(5.0))
        assert float((with_concepts - loss).detach()) == pytest.approx(9.0, rel=1e-5)
        with_concepts.backward()
        assert next(guide.parameters()).grad is not None
        torch.testing.assert_close(ag.explain(model, images).logits, 2 * plain)
        with torch.no_grad():
            torch.testing.assert_close(model(images), 2 * plain)
    torch.testing.assert_close(model(images).detach(), plain)


def test_an_adapter_whose_layer_never_runs() -> None:
    adapter = Doubling()
    model = nn.Sequential(OrderedDict(body=cnn()))
    model.body.idler = nn.Identity()
    model.body.forward = lambda x: model.body.head(model.body.block4(model.body.block3(  # type: ignore[method-assign]
        model.body.block2(model.body.block1(x)))).mean(dim=(2, 3)))  # fmt: skip
    adapter.layer = "body.idler"
    with ag.Guide(model, adapters=[adapter]), pytest.raises(ag.AttnGuideError, match="did not run"):
        model(batch()[0])


def test_labels_and_masks_that_were_made_in_inference_mode() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    guide = ag.Guide(model)
    model(images)
    expected = float(guide.loss(labels, mask=masks).detach())
    with torch.inference_mode():
        other = {
            "mask": torch.nn.functional.avg_pool2d(masks[:, None], 8)[:, 0],
            "sample_weight": torch.ones(4),
        }
        classes = labels.clone()
    loss = guide.loss(classes, **other)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()
