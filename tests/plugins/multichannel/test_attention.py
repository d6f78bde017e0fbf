"""Multi-channel attention on models of all kinds: masks, losses, saving, pruning."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from tests.contract.settings import SETTINGS
from tests.helpers.hosts import nightly_vgg
from torch import Tensor, nn
from torch.nn.utils import stateless

import attnguide as ag
from attnguide import _contract
from attnguide.errors import DataError, GuidanceError, InputError, LayerError
from attnguide.testing import hooks, snapshot
from attnguide_multichannel import masking
from attnguide_multichannel.adapted import attach, load_adapters, multichannel_of
from attnguide_multichannel.attention import Masks, MultiChannel
from attnguide_multichannel.masking import FullMasks, SharedMasks
from attnguide_multichannel.pruning import magnitude_ranking, prune, without_channels
from attnguide_multichannel.source import MultiChannelMaps
from attnguide_multichannel.transform import emphasized, important, suppressed, transformed

SIDE, CLASSES = 64, 5

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=CLASSES, dropout=0.0),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=CLASSES),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=CLASSES, depth=2),
}


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def labels(count: int = 4, classes: int = CLASSES) -> Tensor:
    return (torch.rand(count, classes, generator=torch.Generator().manual_seed(2)) > 0.5).float()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


def made(channels: int = 6, classes: int = 3, masks: Masks = "shared") -> MultiChannel:
    torch.manual_seed(0)
    adapter = MultiChannel(channels, classes, masks=masks, maps=4 if masks == "shared" else None)
    with torch.no_grad():
        if isinstance(adapter.masking, SharedMasks):
            adapter.masking.deviation.normal_()
        else:
            adapter.masking.weight.normal_()
            adapter.masking.bias.normal_()
        adapter.bias.normal_()
    return adapter


BOTH = pytest.mark.parametrize("masks", ["shared", "full"])


# -------------------------------------------------------------------------- masks


@BOTH
@pytest.mark.parametrize(("channels", "classes"), [(6, 3), (1, 3), (6, 1), (1, 1)])
def test_scores_are_linear_in_what_the_masks_let_through(masks: Masks, channels: int, classes: int) -> None:
    adapter, features = made(channels, classes, masks), torch.randn(2, channels, 5, 4)
    found = adapter.masks(features)
    assert found.shape == (2, classes, channels, 5, 4)
    assert ((found >= 0) & (found <= 1)).all()
    if masks == "shared":
        torch.testing.assert_close(found.sum(dim=(3, 4)), torch.ones(2, classes, channels))
    through = (features[:, None] * found).sum(dim=(3, 4)) / (1 if masks == "shared" else 5 * 4)
    expected = (through * adapter.weight).sum(dim=2) + adapter.bias
    torch.testing.assert_close(adapter.scores(adapter.attended(features)), expected)
    torch.testing.assert_close(adapter.mean_masks(features), found.mean(dim=2))


@BOTH
def test_masks_depend_on_the_image_and_not_on_the_size_of_its_features(masks: Masks) -> None:
    adapter, features = made(masks=masks), torch.randn(2, 6, 5, 4)
    found = adapter.masks(features)
    assert (found[0] - found[1]).abs().max() > 1e-3
    torch.testing.assert_close(adapter.masks(100 * features), found, rtol=1e-3, atol=1e-5)
    assert adapter.masks(torch.zeros(1, 6, 5, 4)).isfinite().all()


def test_full_masks_are_those_of_a_loop() -> None:
    adapter, features = made(masks="full"), torch.randn(2, 6, 5, 4)
    assert isinstance(adapter.masking, FullMasks)
    weight, bias = adapter.masking.weight.tolist(), adapter.masking.bias.tolist()
    found = adapter.masks(features).tolist()
    for number, image in enumerate(features.tolist()):
        squares = [value**2 for channel in image for row in channel for value in row]
        size = (sum(squares) / len(squares)) ** 0.5
        for attribute, channel, row, column in product(range(3), range(6), range(5), range(4)):
            logit = bias[attribute][channel]
            for other in range(6):
                logit += weight[attribute][channel][other] * image[other][row][column] / size
            expected = 1 / (1 + math.exp(-logit))
            assert found[number][attribute][channel][row][column] == pytest.approx(expected, abs=1e-5)


def test_full_masks_have_a_higher_rank_than_mixtures_of_shared_maps() -> None:
    features = torch.randn(1, 6, 5, 4)
    ranks = {
        masks: int(torch.linalg.matrix_rank(made(masks=masks).masks(features)[0].flatten(0, 1).flatten(1)))
        for masks in ("shared", "full")
    }
    assert ranks["shared"] <= 4
    assert ranks["full"] == 3 * 6


def test_full_masks_start_close_to_a_linear_classifier_of_the_pooled_features() -> None:
    torch.manual_seed(0)
    adapter, features = MultiChannel(64, 5, masks="full"), torch.rand(8, 64, 7, 7)
    pooled = 0.5 * F.linear(features.mean(dim=(2, 3)), adapter.weight)
    scores = adapter.scores(adapter.attended(features))
    assert (scores - pooled).abs().max() < 0.1 * pooled.abs().max()
    assert (adapter.masks(features) - 0.5).abs().max() < 0.15


def test_a_full_mask_can_say_that_a_channel_does_not_matter() -> None:
    adapter, features = made(masks="full"), torch.randn(2, 6, 5, 4)
    assert isinstance(adapter.masking, FullMasks)
    with torch.no_grad():
        adapter.masking.weight[1, 2] = 0
        adapter.masking.bias[1, 2] = -200
    before = adapter.scores(adapter.attended(features))
    features[:, 2] *= -1  # of the same size, so that the other masks see it alone
    with torch.no_grad():
        adapter.masking.weight[:, :, 2] *= -1
    torch.testing.assert_close(adapter.scores(adapter.attended(features))[:, 1], before[:, 1])


@BOTH
def test_gradients_are_those_of_finite_differences(masks: Masks) -> None:
    adapter = made(masks=masks).double()
    names, weights = zip(*adapter.masking.named_parameters(), strict=True)
    features = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)

    def reduced(features: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        with stateless._reparametrize_module(adapter.masking, dict(zip(names, values, strict=True))):
            return adapter.attended(features), adapter.mean_masks(features)

    assert torch.autograd.gradcheck(reduced, (features, *weights), atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("masks", ["masks", "mean_masks", "attended"])
def test_full_masks_that_cannot_fit_are_refused(masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, features = made(masks="full"), torch.randn(2, 6, 5, 4)
    numbers = 2 * 3 * 6 * 5 * 4
    monkeypatch.setattr(masking, "_memory_of", lambda device: 4 * numbers)
    getattr(adapter, masks)(features)
    monkeypatch.setattr(masking, "_memory_of", lambda device: 4 * numbers - 1)
    with pytest.raises(
        InputError, match=r"2 images, 3 attributes, 6 channels and 5×4 positions take .*smaller"
    ):
        getattr(adapter, masks)(features)
    if masks != "masks":  # without gradients one attribute is computed after another
        with torch.no_grad():
            getattr(adapter, masks)(features)
    # What one weight takes: itself, its gradient, and two moments.
    monkeypatch.setattr(masking, "_memory_of", lambda device: 16 * CLASSES * 6**2 - 1)
    with pytest.raises(InputError, match=r"have 180 weights, .* fewer channels, or masks='shared'"):
        attach(small(), images(), masks="full")


def test_training_keeps_each_value_of_full_masks_once() -> None:
    adapter, features = made(classes=20, masks="full"), torch.randn(4, 6, 8, 8)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = adapter.scores(adapter.attended(features))
    numbers = 4 * 20 * 6 * 8 * 8
    assert numbers <= sum(kept.values()) < 1.25 * numbers
    scores.sum().backward()


@pytest.mark.parametrize("masks", ["shared", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(masks: Masks, dtype: torch.dtype) -> None:
    adapter, features = made(masks=masks), torch.randn(2, 6, 5, 4)
    expected = adapter.scores(adapter.attended(features))
    adapter.to(dtype)
    scores = adapter.scores(adapter.attended(features.to(dtype)))
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_of_devices(device: str) -> None:
    memory = masking._memory_of(torch.device(device))
    assert memory is None if device == "meta" else memory is None or memory > 2**28


def test_own_loss_is_a_weighted_sum() -> None:
    model, batch, truth = small(), images(), labels()
    with attach(model, batch, multi_label=0.7, reconstruction=0.3) as adapted:
        adapter = multichannel_of(adapted)
        model(batch)
        found = adapted.loss(truth)
        features = model[:3](batch)
        assert adapter.classifier is not None
        assert adapter.reconstructor is not None
        own = F.binary_cross_entropy_with_logits(adapter.classifier(features.mean(dim=(2, 3))), truth)
        again = adapter.reconstructor(features, (SIDE, SIDE))
        assert again.shape == (4, 3, 64, 64)
        torch.testing.assert_close(found, 0.7 * own + 0.3 * (again - batch).square().mean())
    with attach(model, batch, multi_label=0, reconstruction=0) as adapted:
        model(batch)
        assert adapted.loss(truth).item() == 0
        assert multichannel_of(adapted).classifier is None


def test_single_label_models_take_class_indices() -> None:
    model = small()
    with attach(model, images()) as adapted:
        model(images())
        many = adapted.loss(F.one_hot(torch.tensor([0, 1, 2, 4]), CLASSES).float())
        model(images())
        torch.testing.assert_close(adapted.loss(torch.tensor([0, 1, 2, 4])), many)


def test_wrong_labels_and_features() -> None:
    model = small()
    with attach(model, images()) as adapted:
        model(images())
        with pytest.raises(InputError, match=r"shape \(4, 3\); expected \(4, 5\), or \(4,\)"):
            adapted.loss(torch.zeros(4, 3))
        with pytest.raises(InputError, match="outside of 0 to 4"):
            adapted.loss(torch.tensor([0, 1, 2, 5]))
    with pytest.raises(LayerError, match=r"have 7 channels, but .* made for 6"):
        made().scores(made().attended(torch.rand(2, 7, 4, 4)))


@pytest.mark.parametrize(
    "settings", [{"maps": 0}, {"multi_label": -1.0}, {"reconstruction": float("nan")}, {"classes": 0}]
)
def test_wrong_numbers(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be at least"):
        attach(small(), images(), **settings)  # type: ignore[arg-type]


def test_wrong_kinds_of_masks() -> None:
    with pytest.raises(InputError, match="masks='ful' must be one of shared, full"):
        attach(small(), images(), masks="ful")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="maps=8 is the number of shared maps, and full masks have none"):
        attach(small(), images(), masks="full", maps=8)


# -------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("name", nightly_vgg(HOSTS))
def test_hosts_train_save_load_and_come_off(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch, truth = HOSTS[name](), images(), labels()
    code = {kind: kind.forward for kind in {type(module) for module in model.modules()}}
    names, before = list(model.state_dict()), hooks(model)
    adapted = attach(model, batch)
    optimizer = torch.optim.Adam([*model.parameters(), *adapted.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = F.binary_cross_entropy_with_logits(model(batch), truth) + adapted.loss(truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(weight.grad is not None for weight in multichannel_of(adapted).parameters())
    model.eval()
    answers = model(batch)
    adapted.save(tmp_path / "attention.safetensors")
    adapted.remove()
    assert list(model.state_dict()) == names
    assert hooks(model) == before
    assert all(kind.forward is forward for kind, forward in code.items())
    assert not torch.allclose(model(batch), answers)
    loaded = load_adapters(model, tmp_path / "attention.safetensors")
    assert torch.equal(model(batch), answers)
    folded = loaded.fold(batch).eval()
    program = torch.export.export(folded, (batch,))
    torch.testing.assert_close(program.module()(batch), answers)


def test_full_masks_train_save_load_fold_and_come_off(tmp_path: Path) -> None:
    model, batch, truth = small(), images(), labels()
    before = hooks(model)
    adapted = attach(model, batch, masks="full")
    optimizer = torch.optim.Adam([*model.parameters(), *adapted.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.binary_cross_entropy_with_logits(model(batch), truth) + adapted.loss(truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in multichannel_of(adapted).named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()), name
    answers = model.eval()(batch)
    adapted.save(tmp_path / "attention.safetensors")
    adapted.remove()
    assert hooks(model) == before
    with load_adapters(model, tmp_path / "attention.safetensors") as loaded:
        assert isinstance(multichannel_of(loaded).masking, FullMasks)
        assert torch.equal(model(batch), answers)
        folded = loaded.fold(batch).eval()
        torch.testing.assert_close(folded(batch), answers)
        program = torch.export.export(folded, (batch,))
        torch.testing.assert_close(program.module()(batch), answers)


def test_full_masks_on_tokens() -> None:
    torch.manual_seed(0)
    model = HOSTS["vit"]()
    with attach(model, images(), masks="full") as adapted:
        (model(images()).square().mean() + adapted.loss(labels())).backward()
        shown = ag.explain(model, images(), source="multichannel", targets="all", size=None)
        assert shown.maps.shape == (4, CLASSES, 4, 4)
        assert all(bool(weight.grad.any()) for weight in multichannel_of(adapted).parameters())


def test_full_masks_keep_the_contract_of_adapters(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SETTINGS, ("adapter", "multichannel"), {"channels": 16, "classes": 4, "masks": "full"}
    )
    _contract.test_an_adapter_comes_and_goes(pytestconfig, "multichannel")


def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HOSTS["resnet18"]().eval()
    with attach(model, images()) as adapted:
        adapted.save(tmp_path / "attention.safetensors")
        torch.save(model.state_dict(), tmp_path / "model.pt")
        torch.save((images(), model(images()).detach()), tmp_path / "expected.pt")
    script = f"""
import torch, torchvision
torch.set_num_threads(1)
from attnguide_multichannel.adapted import load_adapters
model = torchvision.models.resnet18(num_classes={CLASSES}).eval()
model.load_state_dict(torch.load("model.pt", weights_only=True))
load_adapters(model, "attention.safetensors")
images, expected = torch.load("expected.pt", weights_only=True)
assert torch.equal(model(images), expected)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from attnguide_segmentation import adapted as segmentation

    with segmentation.attach(small(), images(), "average") as other:
        other.save(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="'pyramid'; expected multichannel"):
        load_adapters(small(), tmp_path / "other.safetensors")
    with attach(small(), images()) as adapted:
        adapted.save(tmp_path / "attention.safetensors")
    with pytest.raises(DataError, match="'multichannel'; expected ssp"):
        segmentation.load_adapters(small(), tmp_path / "attention.safetensors")


# ------------------------------------------------------------------------- source


def test_masks_explain_and_guide() -> None:
    model, batch, truth = small(), images(), labels()
    target = torch.zeros(4, SIDE, SIDE)
    target[:, :32, :32] = 1
    term = ag.Term(source="multichannel", prior="mask", loss="energy", targets="all", weight=5.0)
    with ag.Guide(model, terms=[term], adapters=attach(model, batch)) as adapted:
        shown = ag.explain(model, batch, source="multichannel", targets="all", size=None)
        features = model[:3].eval()(batch)
        model.train()
        torch.testing.assert_close(shown.maps, multichannel_of(adapted.adapters).mean_masks(features))
        optimizer = torch.optim.Adam(adapted.parameters(), lr=3e-2)

        def inside() -> float:
            maps = ag.explain(model, batch, source="multichannel", targets="all").maps
            return float((maps * target[:, None]).sum() / maps.sum())

        first = inside()
        for _ in range(80):
            model(batch)
            loss = adapted.loss(truth, mask=target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert first < 0.4
        assert inside() > 0.7


def test_full_masks_explain_and_guide() -> None:
    model, batch, truth = small(), images(), labels()
    batch[:, :, :32, :32] += 2
    target = torch.zeros(4, SIDE, SIDE)
    target[:, :32, :32] = 1
    term = ag.Term(source="multichannel", prior="mask", loss="iou", targets="all", weight=5.0)
    with ag.Guide(model, terms=[term], adapters=attach(model, batch, masks="full")) as adapted:

        def inside() -> float:
            maps = ag.explain(model, batch, source="multichannel", targets="all").maps
            return float((maps * target[:, None]).sum() / maps.sum())

        optimizer = torch.optim.Adam(adapted.parameters(), lr=3e-2)
        first = inside()
        for _ in range(80):
            model(batch)
            loss = adapted.loss(truth, mask=target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert first < 0.4
        assert inside() > 0.7


def test_a_source_without_masks_says_so() -> None:
    model = small()
    with pytest.raises(GuidanceError, match=r"none on the model. Put it on first"):
        ag.explain(model, images(), source="multichannel")
    with attach(model, images()), pytest.raises(LayerError, match="has 3 channels"):
        ag.explain(
            nn.Sequential(nn.Conv2d(3, 3, 1), model), images(), source=MultiChannelMaps(made()), layer="0"
        )


# ---------------------------------------------------------------------- transform


@BOTH
def test_transformations_change_masks_for_a_while(masks: Masks) -> None:
    adapter, features = made(masks=masks), torch.randn(2, 6, 5, 4)
    before, score = adapter.masks(features), adapter.scores(adapter.attended(features))
    factors = torch.ones(3, 6)
    factors[1, 2] = 0
    with transformed(adapter, factors):
        after = adapter.masks(features)
        assert (after[:, 1, 2] == 0).all()
        changed = adapter.scores(adapter.attended(features))
        torch.testing.assert_close(adapter.mean_masks(features), after.mean(dim=2))
        gone = (features[:, 2] * before[:, 1, 2]).sum(dim=(1, 2)) * adapter.weight[1, 2]
        gone = gone if masks == "shared" else gone / (5 * 4)
        torch.testing.assert_close(changed[:, 1], score[:, 1] - gone)
        torch.testing.assert_close(changed[:, [0, 2]], score[:, [0, 2]])
    assert torch.equal(adapter.masks(features), before)
    with pytest.raises(ZeroDivisionError), transformed(adapter, factors):
        raise ZeroDivisionError
    assert torch.equal(adapter.masks(features), before)


def test_channels_are_emphasised_and_suppressed() -> None:
    adapter = made()
    importance = torch.tensor([[5.0, 4, 1, 1, 1, 1], [1, 5, 4, 1, 1, 1], [1, 1, 1, 1, 4, 5]])
    chosen = important(importance, 1 / 3)
    assert chosen.nonzero()[:, 1].tolist() == [0, 1, 1, 2, 4, 5]
    with emphasized(adapter, importance, share=1 / 3, factor=0.5):
        assert torch.equal(adapter.masking.factors, torch.where(chosen, 1.0, 0.5))
    with suppressed(adapter, importance, 0, of=[1], share=1 / 3):
        # Channel 1 is more important to the other; channel 0 is its own.
        assert adapter.masking.factors[0].tolist() == [1, 0, 0, 1, 1, 1]
        assert (adapter.masking.factors[1:] == 1).all()
    assert (adapter.masking.factors == 1).all()
    with pytest.raises(InputError, match="share=0"), emphasized(adapter, importance, share=0):
        pass
    with pytest.raises(InputError, match="at least 0"), transformed(adapter, -torch.ones(3, 6)):
        pass
    with pytest.raises(InputError, match="expected"), transformed(adapter, torch.ones(2, 6)):
        pass


# ------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("name", nightly_vgg(HOSTS))
def test_pruned_hosts_are_smaller_and_go_on_training(name: str) -> None:
    torch.manual_seed(0)
    model, batch = HOSTS[name]().eval(), images()
    with attach(model, batch) as adapted:
        answers = model(batch)
        before = snapshot(model)
        channels = multichannel_of(adapted).masking.channels
        ranking = torch.randperm(channels)
        smaller = prune(adapted, batch, ranking, 0.3)
        kept = channels - round(0.3 * channels)
        assert multichannel_of(smaller).masking.channels == kept
        assert smaller.model(batch).shape == answers.shape
        assert sum(p.numel() for p in smaller.model.parameters()) < sum(p.numel() for p in model.parameters())
        (F.mse_loss(smaller.model(batch), answers.detach()) + smaller.loss(labels())).backward()
        assert torch.equal(model(batch), answers)
        assert {**snapshot(model), "process": None} == {**before, "process": None}


def test_what_is_left_of_pruned_features_is_as_it_was() -> None:
    torch.manual_seed(0)
    model, batch = HOSTS["vgg11_bn"]().eval(), images()
    with attach(model, batch) as adapted, torch.no_grad():
        adapter = multichannel_of(adapted)
        ranking = torch.randperm(512)
        smaller = prune(adapted, batch, ranking, 0.25)
        kept = sorted(ranking[128:].tolist())
        features = model.features[:28](batch)[:, kept]
        torch.testing.assert_close(smaller.model.features[:28](batch), features)
        expected = without_channels(adapter, kept)
        torch.testing.assert_close(smaller.model(batch), expected.scores(expected.attended(features)))
        assert magnitude_ranking(adapted, batch).sort().values.tolist() == list(range(512))


@BOTH
def test_what_is_left_of_the_masks_are_those_of_the_channels_kept(masks: Masks) -> None:
    torch.manual_seed(0)
    model, batch = small().eval(), images()
    with attach(model, batch, masks=masks) as adapted, torch.no_grad():
        adapter = multichannel_of(adapted)
        adapter.masking.factors[1, 3] = 0.5
        smaller = prune(adapted, batch, [5, 0, 1, 2, 3, 4], 0.2)
        left, features = multichannel_of(smaller), model[:3](batch)[:, :5]
        torch.testing.assert_close(smaller.model[:3](batch), features)
        torch.testing.assert_close(smaller.model(batch), left.scores(left.attended(features)))
        # What the sixth channel added to the other masks is gone, and features are of another size.
        whole = model[:3](batch)
        whole[:, 5] = 0
        reads = adapter.masking.places if isinstance(adapter.masking, SharedMasks) else adapter.masking
        reads.get_parameter("weight").mul_((5 / 6) ** 0.5)
        torch.testing.assert_close(left.masks(features), adapter.masks(whole)[:, :, :5])


def test_wrong_rankings() -> None:
    with attach(small(), images()) as adapted:
        with pytest.raises(InputError, match="each of the 6 channels once"):
            prune(adapted, images(), [0, 1, 1, 2, 3, 4], 0.5)
        with pytest.raises(InputError, match="share=1"):
            prune(adapted, images(), range(6), 1.0)
        whole = prune(adapted, images(), range(6), 0.0)
        assert torch.equal(whole.model(images()), adapted.model(images()))
    with pytest.raises(InputError, match="hold no multi-channel attention"):
        multichannel_of(ag.Guide(small()).adapters)


def test_channels_that_torch_pruning_cannot_follow() -> None:
    host = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES).eval()
    with attach(host, images(2)) as adapted:
        channels = multichannel_of(adapted).masking.channels
        with pytest.raises(LayerError, match=r"torch-pruning cannot follow the channels of 'conv5\.0'"):
            prune(adapted, images(2), range(channels), 0.3)
        adapted.model(images(2))
