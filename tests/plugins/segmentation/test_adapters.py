"""SSP, SSG and their like, on models of all kinds."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from tests.helpers.hosts import nightly_vgg
from tests.helpers.processes import run_in_processes
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import AttnGuideError
from attnguide.testing import hooks
from attnguide_segmentation._hosts import find_gate, first_convolution
from attnguide_segmentation.adapted import Average, attach, load_adapters
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.gating import SSG
from attnguide_segmentation.pooling import SSP, region_means
from attnguide_segmentation.regions import as_masks, normalized, resized

SIDE, CLASSES = 64, 5


def from_torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: from_torchvision("resnet18"),
    "vgg11_bn": lambda: from_torchvision("vgg11_bn"),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=CLASSES),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=CLASSES, depth=2),
}
GATED = [name for name in HOSTS if name != "vit"]


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def stripes(batch: Tensor) -> Tensor:
    """A parser whose regions are horizontal stripes, another order for each image."""
    rows = torch.arange(batch.shape[-2]) * 7 // batch.shape[-2]
    labels = (rows[None, :, None] + torch.arange(len(batch))[:, None, None]) % 7
    return as_masks(labels.expand(-1, -1, batch.shape[-1]))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = HOSTS[name]()
    with torch.no_grad():  # the fresh heads of timm's models are close to nothing
        list(model.parameters())[-2].normal_(std=0.5)
    return model.eval()


# ------------------------------------------------------------------- the methods


def test_means_inside_of_regions() -> None:
    features, masks = torch.rand(2, 3, 4, 4), as_masks(torch.randint(0, 3, (2, 4, 4)))
    means = region_means(features, masks)
    for sample in range(2):
        for region in range(7):
            inside = masks[sample, region] > 0
            expected = features[sample][:, inside].mean(dim=1) if inside.any() else torch.zeros(3)
            torch.testing.assert_close(means[sample, region], expected)


def test_ssp_is_a_weighted_sum_of_what_the_regions_say() -> None:
    adapter = SSP(3, 2, regions=RegionFinder(stripes))
    features, masks = torch.rand(2, 3, 7, 7), stripes(torch.zeros(2, 3, 7, 7))
    scores, weights = adapter.branches(features, masks)
    assert scores.shape == weights.shape == (2, 7, 2)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 2))
    means = features.mean(dim=3)  # each row is a region
    order = [[(row + sample) % 7 for row in range(7)] for sample in range(2)]
    for sample in range(2):
        pooled = torch.stack([means[sample, :, order[sample].index(region)] for region in range(7)])
        torch.testing.assert_close(
            scores[sample], pooled @ adapter.recognition.weight.T + adapter.recognition.bias
        )


def test_normalised_regions_compete_on_equal_terms() -> None:
    adapter = SSP(3, 2, regions=RegionFinder(stripes), normalize=True)
    features, masks = torch.rand(2, 3, 7, 7), stripes(torch.zeros(2, 3, 7, 7))
    assert torch.allclose(adapter.branches(features, masks)[1], torch.tensor(1 / 7))
    torch.nn.init.normal_(adapter.localisation.weight)
    scores, weights = adapter.branches(features, masks)
    large = features.clone()
    large[0, :, 2] *= 50  # one region's features
    for found, expected in zip(adapter.branches(large, masks), (scores, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    means = region_means(features, masks)
    centred = means - means.mean(dim=2, keepdim=True)
    expected = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    beliefs = adapter.localisation(expected) / 3**0.5
    torch.testing.assert_close(weights, beliefs.softmax(dim=1))


def test_gated_maxima_are_those_of_each_region() -> None:
    """With one-hot weights SSG's restoring convolution picks the maximum of one region."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)).eval()
    adapter = SSG(2, after="0", through=["2", "3"], start="paper", regions=RegionFinder(stripes)).eval()
    with torch.no_grad():
        adapter.restore.weight.zero_()
        adapter.restore.bias.zero_()  # type: ignore[union-attr]
        for channel in range(2):
            adapter.restore.weight[channel, 3 * 2 + channel] = 1  # of the region 3
    batch = torch.rand(2, 3, 14, 14)
    handles = list(adapter.attach(model))
    seen = model(batch)
    for handle in handles:
        handle.remove()
    share = normalized(stripes(batch))[:, 3:4] * 14 * 14  # what the normalisation would take out again
    expected = F.max_pool2d((model[0](batch) * share / (1 + 1e-5) ** 0.5).relu(), 2)
    torch.testing.assert_close(seen, expected)


def test_mask_channels_are_a_convolution_of_ten_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = images(2)
    with attach(model, batch, "mask_channels", regions=stripes) as adapted:
        adapter = adapted.modules[0]
        model.train()
        adapted.modules.train()
        seen = model(batch)
        masks = F.batch_norm(stripes(batch), None, None, training=True)
        weight = torch.cat([model[0].weight, adapter.conv.weight], dim=1)  # type: ignore[union-attr, list-item]
        both = F.conv2d(torch.cat([batch, masks], dim=1), weight, model[0].bias, 2, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(seen, both.mean(dim=(2, 3)))


# ---------------------------------------------------------------------- on hosts


@pytest.mark.parametrize("name", nightly_vgg(HOSTS))
@pytest.mark.parametrize(
    "methods", [("ssp",), ("ssg",), ("ssp", "ssg"), ("pyramid",), ("mask_channels",)], ids="+".join
)
def test_it_trains_saves_loads_and_comes_off(name: str, methods: tuple[str, ...], tmp_path: Path) -> None:
    model, batch = made(name), images()
    if name not in GATED and "ssg" in methods:
        with pytest.raises(AttnGuideError, match="SSG gates rows and columns"):
            attach(model, batch, *methods, regions=stripes)
        assert not hooks(model)
        return
    described, original = str(model), model(batch)
    code = [type(module).forward for module in model.modules()]
    adapted = attach(model, batch, *methods, regions=stripes)
    model.train()
    optimizer = torch.optim.SGD([*model.parameters(), *adapted.parameters()], lr=0.1)
    F.cross_entropy(model(batch), torch.arange(4)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.parameters())
    optimizer.step()
    model.eval()
    logits = model(batch)
    assert logits.shape == (4, CLASSES)
    adapted.save(tmp_path / "adapters.safetensors")
    adapted.remove()
    assert not hooks(model)
    assert str(model) == described
    assert [type(module).forward for module in model.modules()] == code
    assert all("forward" not in vars(module) for module in model.modules())
    assert not torch.equal(model(batch), original)  # it was trained
    with load_adapters(model, tmp_path / "adapters.safetensors", regions=stripes):
        assert torch.equal(model(batch), logits)


@pytest.mark.parametrize("name", nightly_vgg(GATED))
def test_ssg_from_identity_changes_nothing_at_first(name: str) -> None:
    model, batch = made(name), images()
    before = model(batch)
    with attach(model, batch, "ssg", regions=stripes):
        assert (model(batch) - before).abs().max() <= 1e-5
    with attach(model, batch, "ssg", regions=stripes, start="paper"):
        assert (model(batch) - before).abs().max() > 1e-3


def test_where_ssg_goes() -> None:
    batch = images(2)
    gate = find_gate(made("vgg11_bn"), batch, "stage:2")
    assert (gate.after, gate.through, gate.instead_of) == (
        "features.11",
        ("features.13", "features.14"),
        "features.14",
    )
    gate = find_gate(made("resnet18"), batch, "stage:0")
    assert (gate.after, gate.through, gate.instead_of) == ("conv1", ("relu", "maxpool"), "maxpool")
    # The sum of a block is not what its last normalisation gave.
    assert find_gate(made("resnet18"), batch, "layer2").after == "layer2"
    assert first_convolution(made("vit"), batch)[0] == "patch_embed.proj"


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_folded_and_exported(name: str, start: str) -> None:
    model, batch = made(name), images(2)
    methods = ("ssp", "ssg") if name in GATED else ("ssp",)
    adapted = attach(model, batch, *methods, regions=Striped(), start=start)  # type: ignore[arg-type]
    expected = model(batch)
    folded = adapted.fold(batch).eval()
    assert not hooks(model)
    assert torch.equal(folded(batch), expected)
    assert torch.equal(copy.deepcopy(folded)(batch), expected)
    assert not hooks(model)
    program = torch.export.export(folded, (batch,)).module()
    torch.testing.assert_close(program(batch), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's exporter warns of its own future
@pytest.mark.filterwarnings("ignore:the embedded face parser knows drawn faces only")  # noise has no faces
def test_folded_as_onnx(tmp_path: Path) -> None:
    model, batch = made("resnet18"), images(2)
    adapted = attach(model, batch, "ssp", "ssg", start="paper")  # with the parser that comes along
    expected = model(batch)
    torch.onnx.export(
        adapted.fold(batch).eval(), (batch,), tmp_path / "model.onnx", dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=1e-4)


class Striped(nn.Module):
    """Stripes, as a module."""

    def forward(self, batch: Tensor) -> Tensor:
        return stripes(batch)


def test_adapters_load_in_a_fresh_process(tmp_path: Path) -> None:
    model, batch = made("resnet18"), images(2)
    with attach(model, batch, "ssp", regions=stripes) as adapted:
        expected = model(batch)
        adapted.save(tmp_path / "ssp.safetensors")
    torch.save({"batch": batch, "expected": expected, "model": model.state_dict()}, tmp_path / "rest.pt")
    script = f"""
import torch, torchvision
from attnguide_segmentation.adapted import load_adapters
from attnguide_segmentation.regions import as_masks
rest = torch.load({str(tmp_path / "rest.pt")!r}, weights_only=True)
model = torchvision.models.resnet18(num_classes={CLASSES}).eval()
model.load_state_dict(rest["model"])
def stripes(batch):
    rows = torch.arange(batch.shape[-2]) * 7 // batch.shape[-2]
    labels = (rows[None, :, None] + torch.arange(len(batch))[:, None, None]) % 7
    return as_masks(labels.expand(-1, -1, batch.shape[-1]))
with load_adapters(model, {str(tmp_path / "ssp.safetensors")!r}, regions=stripes):
    assert torch.equal(model(rest["batch"]), rest["expected"])
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("methods", [("ssp",), ("pyramid",), ("ssg",), ("ssp", "ssg")], ids="+".join)
@pytest.mark.parametrize("layer", ["layer4", "layer2"])
def test_what_is_explained_is_the_answer_of_the_adapter(methods: tuple[str, ...], layer: str) -> None:
    model, batch = made("resnet18"), images()
    bare = ag.explain(model, batch, "grad_cam", [2], layer, size=None).maps
    with attach(model, batch, *methods, regions=stripes, start="paper"):
        logits = model(batch)
        found = ag.explain(model, batch, "grad_cam", [2], layer, size=None)
        torch.testing.assert_close(found.logits, logits)
        # By hand: the gradient of the answer with respect to the layer's output.
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0].clone()

        handle = model.get_submodule(layer).register_forward_hook(keep, prepend=True)
        answer = model(batch)[:, 2].sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(answer, kept)
    weighted = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0].detach()).sum(dim=1).relu()
    torch.testing.assert_close(found.maps[:, 0], weighted, rtol=1e-3, atol=1e-6)
    assert (found.maps - bare).abs().max() > 1e-4


@pytest.mark.parametrize("first", [True, False])
def test_another_guide_guides_the_answer_of_the_adapter(first: bool) -> None:
    model, batch = made("resnet18"), images()
    other = ag.Guide(model) if first else None
    with attach(model, batch, "ssp", regions=stripes) as adapted:
        other = ag.Guide(model) if other is None else other
        model(batch)
        other.loss(torch.arange(4), mask=torch.rand(4, SIDE, SIDE)).backward()
        assert all(
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for p in adapted.modules[0].recognition.parameters()
            if p.ndim > 1
        )  # type: ignore[union-attr]
        assert model.fc.weight.grad is None or not model.fc.weight.grad.any()  # type: ignore[union-attr]
        other.remove()
    terms = [ag.Term(source="grad_cam", prior="mask", loss="iou")]
    with ag.Guide(model, terms=terms, adapters=attach(model, batch, "ssp", regions=stripes)) as adapted:
        model(batch)
        adapted.loss(torch.arange(4), mask=torch.rand(4, SIDE, SIDE)).backward()
        assert all(p.grad is not None for p in adapted.parameters())


def test_copies_are_normalised_whatever_the_size_of_a_region() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    adapter = SSG(4, after="0", through=["2", "3"], start="paper", regions=RegionFinder(stripes))
    seen: list[Tensor] = []
    adapter.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    handles = list(adapter.attach(model))
    model(torch.rand(8, 3, 112, 112))
    for handle in handles:
        handle.remove()
    assert torch.allclose(seen[0].std(dim=(0, 2, 3)), torch.ones(28), atol=0.05)


def test_ssg_on_models_whose_modules_run_again() -> None:
    model, batch = from_torchvision("resnet50").eval(), images(2)
    gate = find_gate(model, batch)
    with attach(model, batch, "ssg", regions=stripes, start="paper") as adapted:
        assert adapted.modules[0].after == gate.after  # type: ignore[union-attr]
        assert model(batch).shape == (2, CLASSES)
    with pytest.raises(AttnGuideError, match="runs 3 times in a forward pass"):
        find_gate(model, batch, "layer1.0.relu#0")


def test_ssg_on_channels_that_come_last() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=SIDE, depths=(1, 1, 1, 1)).eval()
    with pytest.raises(AttnGuideError, match="arranged as nhwc"):
        attach(model, images(2), "ssg", regions=stripes)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # when the library looks
@pytest.mark.parametrize("reentrant", [True, False])
def test_ssg_refuses_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = made("resnet18")

        def forward(self, batch: Tensor) -> Tensor:
            m = self.model
            x = m.maxpool(m.relu(m.bn1(m.conv1(batch))))  # type: ignore[operator]
            for block in (m.layer1, m.layer2):
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return m.fc(m.avgpool(m.layer4(m.layer3(x))).flatten(1))  # type: ignore[operator]

    model, batch = Checkpointed(), images()
    with attach(model, batch, "ssg", gate="model.layer2", regions=stripes):
        loss = model(batch).sum()
        with pytest.raises(AttnGuideError, match="does not work with activation checkpointing"):
            loss.backward()


def test_another_guide_leaves_the_first_pass_gated() -> None:
    model, batch = made("resnet18"), images()
    with attach(model, batch, "ssg", regions=stripes, start="paper"), ag.Guide(model):
        torch.testing.assert_close(model(batch), model(batch.clone()))


def test_copies_for_the_regions_are_not_shown_to_others() -> None:
    model, batch = made("resnet18"), images()
    seen: list[int] = []
    handle = model.relu.register_forward_hook(lambda _, __, output: seen.append(len(output)))  # type: ignore[union-attr]
    with attach(model, batch, "ssg", gate="stage:0", regions=stripes):
        seen.clear()
        model(batch)
        assert seen == [4]
    handle.remove()


def test_a_copy_of_a_model_answers_for_itself() -> None:
    model, batch = made("resnet18"), images()
    bare = model(batch)
    with attach(model, batch, "ssg", "ssp", regions=stripes, start="paper"):
        changed = model(batch)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(batch), bare)
        torch.testing.assert_close(model(batch), changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("methods", [("ssp",), ("ssg",), ("pyramid",), ("mask_channels",)], ids="+".join)
def test_models_of_another_precision(dtype: torch.dtype, methods: tuple[str, ...]) -> None:
    model, batch = made("resnet18").to(dtype), images().to(dtype)
    with attach(model, batch, *methods, regions=stripes):
        assert model(batch).dtype == dtype


def test_inference_mode_and_training_take_turns() -> None:
    model = made("resnet18")
    with torch.inference_mode():
        batch = images()
        adapted = attach(model, batch, "ssg", "mask_channels", regions=stripes)
        expected = model(batch)
    usual = images()
    torch.testing.assert_close(model(usual), expected)
    with torch.inference_mode():
        model(usual)
    model(usual).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())
    adapted.remove()


def test_masks_are_found_anew_in_each_pass() -> None:
    found = []

    def counted(batch: Tensor) -> Tensor:
        found.append(batch.sum().item())
        return stripes(batch)

    model, batch = made("resnet18"), images()
    with attach(model, batch, "ssg", regions=counted):
        model(batch)
        batch.data.zero_()
        model(batch)
        assert found[-1] == 0


def test_masks_for_the_wrong_batch_are_not_kept() -> None:
    model, batch = made("resnet18"), images()
    with attach(model, batch, "ssp", regions=stripes) as adapted:
        adapted.finder.give(stripes(batch)[:2])
        with pytest.raises(AttnGuideError, match="given for 2 images"):
            model(batch)
        model(batch)


class Drifting(nn.Module):
    """A parser in training mode, whose output is no share of anything."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norm, self.factor = nn.BatchNorm2d(3), factor

    def forward(self, batch: Tensor) -> Tensor:
        self.norm(batch)
        return stripes(batch) * self.factor


def test_a_parser_is_held_still_and_looked_at() -> None:
    model, batch = made("resnet18").train(), images()
    parser = Drifting(1.0)
    with attach(model, batch, "ssp", regions=parser):
        model(batch)
    assert int(parser.norm.num_batches_tracked or 0) == 0
    for bad in (-1.0, 2.0, float("nan")):
        refused = pytest.raises(AttnGuideError, match=r"outside of \[0, 1\]")
        with attach(model, batch, "ssp", regions=Drifting(bad)), refused:
            model(batch)
    refused = pytest.raises(AttnGuideError, match="the parser gives tuple")
    with attach(model, batch, "ssp", regions=lambda batch: (batch, batch)), refused:  # type: ignore[arg-type, return-value]
        model(batch)


def test_first_convolutions_of_all_kinds() -> None:
    for conv in (
        nn.Conv2d(3, 4, (3, 5), padding="same"),
        nn.Conv2d(3, 4, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    ):
        model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        with attach(model, images(2), "mask_channels", regions=stripes):
            assert model(images(2)).shape == (2, 3)
    reflecting = from_torchvision("resnet18").eval()
    reflecting.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, padding_mode="reflect")
    with pytest.raises(AttnGuideError, match="plain convolution"):
        attach(reflecting, images(2), "mask_channels", regions=stripes)


def test_guidance_beside_an_adapter_is_what_is_asked_for() -> None:
    model, batch = made("resnet18"), images()
    with ag.Guide(model, weight=0.5, adapters=attach(model, batch, "ssp", regions=stripes)) as adapted:
        assert adapted.terms[0].weight == 0.5
        assert [type(adapter).__name__ for adapter in adapted.adapters] == ["SSP"]


def test_masks_that_are_given() -> None:
    model, batch = made("resnet18"), images()
    with attach(model, batch, "ssp", regions=stripes) as adapted:
        by_parser = model(batch)
        adapted.finder.give(stripes(batch))
        torch.testing.assert_close(model(batch.clone()), by_parser)
        adapted.finder.give(torch.zeros(4, SIDE, SIDE).long())  # background alone: the others are empty
        assert bool(model(batch.clone()).isfinite().all())
        adapted.finder.give(stripes(batch)[:2])
        with pytest.raises(AttnGuideError, match="given for 2 images, the model was called with 4"):
            model(batch.clone())


def test_masks_are_found_once_for_all_adapters() -> None:
    calls = []

    def counted(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return stripes(batch)

    model, batch = made("resnet18"), images()
    with attach(model, batch, "ssp", "ssg", regions=counted):
        model(batch)
        calls.clear()
        model(batch.clone())
        assert calls == [4]


def test_average_of_two_models() -> None:
    one, other, batch = made("resnet18"), made("vgg11_bn"), images(2)
    torch.testing.assert_close(Average([one, other])(batch), (one(batch) + other(batch)) / 2)
    with pytest.raises(AttnGuideError, match="models is empty"):
        Average([])


@pytest.mark.parametrize(
    ("methods", "options", "match"),
    [
        ((), {}, "nothing to attach: name one of ssp"),
        (("sspp",), {}, "Did you mean 'ssp'"),
        (("ssp", "pyramid"), {}, "ssp, pyramid all replace the model's logits"),
        (("ssg",), {"gate": "layer9"}, "layer9"),
        (("boxes", "ssg"), {}, "boxes are 16 regions"),
        (("ssg",), {"start": "zero"}, "start='zero' must be"),
        (("ssp",), {"layer": "fc"}, "fc"),
    ],
)
def test_bad_wishes(methods: tuple[str, ...], options: dict[str, str], match: str) -> None:
    model = made("resnet18")
    with pytest.raises(AttnGuideError, match=match):
        attach(model, images(2), *methods, regions=stripes, **options)  # type: ignore[arg-type]
    assert not hooks(model)


def test_bad_files(tmp_path: Path) -> None:
    model = made("resnet18")
    with pytest.raises(AttnGuideError, match="does not exist"):
        load_adapters(model, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(AttnGuideError, match="does not hold adapters"):
        load_adapters(model, tmp_path / "bad.safetensors")


def test_small_parts_are_resized_by_their_maximum() -> None:
    masks = stripes(torch.zeros(1, 3, 56, 56))
    assert torch.equal(resized(masks, (4, 4))[:, 3:], F.adaptive_max_pool2d(masks, 4)[:, 3:])
    assert torch.equal(resized(masks, (4, 4))[:, :3], F.adaptive_avg_pool2d(masks, 4)[:, :3])


ATTACHED = """
import timm
from attnguide_segmentation.adapted import attach


def work(rank, world, method):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    images, masks = torch.rand(2, 3, 64, 64), torch.rand(2, 7, 64, 64)
    adapted = attach(DDP(model), images, method)
    adapted.finder.give(masks)
    logits = adapted.model(images)
    (logits.sum() + adapted.loss(torch.tensor([0, 1]))).backward()
    assert logits.shape == (2, 4)
    assert all(parameter.grad is not None for parameter in adapted.parameters())
"""


@pytest.mark.parametrize("method", ["ssg", "ssp", "mask_channels"])
def test_on_a_model_wrapped_for_parallel_training(method: str, tmp_path: Path) -> None:
    run_in_processes(ATTACHED, tmp_path, 1, method)
