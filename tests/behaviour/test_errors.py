"""Each mistake gets one clear error, which names the culprit, its value and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers.models import CLASSES, Wrapped, batch, cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import (
    AttnGuideError,
    GuidanceError,
    InputError,
    LayerError,
    PluginError,
    UnknownNameError,
)
from attnguide.priors.boxes import BoxPrior
from attnguide.priors.mask import MaskPrior
from attnguide.sources.grad_cam import GradCAM
from attnguide.testing import snapshot

IMAGES, LABELS, MASKS = batch()


def raises(kind: type[AttnGuideError], *parts: str) -> Any:
    """Expect one error whose message holds all parts, whichever way they are ordered."""
    return pytest.raises(kind, match="(?s)^" + "".join(f"(?=.*(?:{part}))" for part in parts))


def guide_loss(*, guide: dict[str, Any] | None = None, labels: Any = LABELS, **annotations: Any) -> Tensor:
    model = cnn().eval()
    with ag.Guide(model, **guide or {}) as made:
        model(IMAGES)
        return made.loss(labels, **annotations)


# ----------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"source": "gradcam"}, UnknownNameError, ["source 'gradcam'", "mean 'grad_cam'", "layer_attention"]),
        ({"prior": "masks"}, UnknownNameError, ["prior 'masks'", "mean 'mask'", "boxes"]),
        ({"loss": "iuo"}, UnknownNameError, ["loss 'iuo'", "iou"]),
        ({"layer": "blokc4"}, LayerError, ["layer 'blokc4'", "mean 'block4'"]),
        ({"source": GradCAM}, PluginError, ["source", "GradCAM", r"add \(\)"]),
        ({"prior": 3}, PluginError, ["prior", "TargetPrior", "3"]),
        ({"weight": math.nan}, InputError, ["weight=nan", "finite"]),
        ({"weight": math.inf}, InputError, ["weight=inf", "finite"]),
        ({"weight": -0.1}, InputError, ["weight=-0.1", "at least 0"]),
        ({"weight": "1"}, InputError, ["weight='1'"]),
        ({"targets": "label"}, InputError, ["targets='label'", "mean 'labels'"]),
        ({"targets": 3}, InputError, ["targets=3"]),
        ({"targets": None}, InputError, ["targets=None"]),
        ({"targets": []}, InputError, [r"targets=\[\]", "at least one"]),
        ({"targets": [0.5]}, InputError, [r"targets=\[0.5\]", "integers"]),
        ({"targets": ["nose"]}, InputError, ["targets", "nose"]),
        ({"targets": [True, False]}, InputError, ["targets", "integers"]),
        ({"targets": [(0, 1, 2)]}, InputError, ["targets", r"\(1, 3\)"]),
        ({"terms": [ag.Term(evidence="logits")]}, InputError, ["evidence='logits'", "mean 'logit'"]),
        ({"terms": []}, InputError, ["terms is empty"]),
        ({"terms": [ag.Term()], "weight": 0.5}, InputError, ["terms", "weight="]),
        ({"terms": [ag.Term()], "targets": torch.tensor([1])}, InputError, ["terms", "targets="]),
        ({"terms": [{"source": "grad_cam"}]}, InputError, ["attnguide.Term", "grad_cam"]),
        ({"terms": ag.Term()}, None, []),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_construction(options: dict[str, Any], kind: Any, parts: list[str]) -> None:
    if kind is None:
        assert len(ag.Guide(cnn(), **options).terms) == 1
        return
    with raises(kind, *parts):
        ag.Guide(cnn(), **options)


def test_what_is_no_model() -> None:
    with raises(InputError, "torch.nn.Module", "str"):
        ag.Guide("resnet18")  # type: ignore[arg-type]
    with raises(InputError, "torch.nn.Module", "function"):
        ag.explain(lambda images: images, IMAGES)  # type: ignore[arg-type]


def test_a_source_that_cannot_guide() -> None:
    class Perturbation(GradCAM):
        differentiable = False

    with raises(GuidanceError, "Perturbation", "not differentiable"):
        ag.Guide(cnn(), source=Perturbation())


# ------------------------------------------------------------------ annotations


@pytest.mark.parametrize(
    ("annotations", "parts"),
    [
        ({}, ["mask", "mask=…", "None"]),
        ({"masks": MASKS}, ["masks=", "mean 'mask'"]),
        ({"mask": MASKS, "boxes": None}, ["boxes=", "Known: mask"]),
        ({"mask": MASKS[:3]}, [r"\(3, 32, 32\)", "4 samples"]),
        ({"mask": MASKS[0, 0]}, [r"\(32,\)", r"\(4, H, W\)"]),
        ({"mask": MASKS[:, None].expand(4, 3, 32, 32)}, [r"\(4, 3, 32, 32\)", r"\(4, 4, H, W\)"]),
        ({"mask": list(MASKS[:3])}, ["3 entries", "4 samples", "None for missing"]),
        ({"mask": [MASKS[0], MASKS[0][None].expand(3, 32, 32), None, None]}, ["sample 1", r"\(3, 32, 32\)"]),
        ({"mask": [1, 2, 3, 4]}, ["mask of sample 0", "int"]),
        ({"mask": "mask.png"}, ["mask", "str"]),
        ({"mask": MASKS[:, :0]}, ["no pixels"]),
        ({"mask": MASKS.to(torch.complex64)}, ["real numbers"]),
        ({"mask": MASKS * 255}, [r"sample 0", r"outside \[0, 1\]", "divide by 255", "maximum 255"]),
        ({"mask": list(MASKS * 255)}, [r"sample 0", r"outside \[0, 1\]", "divide by 255"]),
        ({"mask": MASKS - 0.1}, [r"outside \[0, 1\]", "minimum -0.1"]),
        ({"mask": MASKS * math.inf}, ["NaN|outside"]),
        ({"mask": torch.where(torch.arange(32) < 3, math.nan, MASKS)}, ["sample 0", "NaN", "in places"]),
        ({"mask": torch.where(torch.arange(32) < 3, -1, MASKS)}, ["sample 0", "ignore_value", "in places"]),
        ({"mask": MASKS * torch.tensor([1, 1, 0, 1])[:, None, None]}, ["sample 2", "empty", "empty='skip'"]),
        ({"mask": [MASKS[0], MASKS[1], None, MASKS[3] * 0]}, ["sample 3", "empty"]),
        ({"mask": MASKS, "sample_weight": torch.ones(3)}, ["sample_weight", r"\(3,\)", r"\(4,\)"]),
        ({"mask": MASKS, "sample_weight": torch.tensor([1, 1, 1, -1])}, ["sample_weight", "at least 0"]),
        ({"mask": MASKS, "sample_weight": torch.tensor([1, 1, 1, math.nan])}, ["sample_weight", "finite"]),
    ],
    ids=range(23),
)
def test_masks(annotations: dict[str, Any], parts: list[str]) -> None:
    with raises(InputError, *parts):
        guide_loss(**annotations)


@pytest.mark.parametrize(
    ("boxes", "parts"),
    [
        (torch.rand(3, 4), ["3 entries", "4 samples"]),
        (torch.rand(4, 5), [r"\(x1, y1, x2, y2\)", r"\(5,\)"]),
        (5, ["boxes", "int"]),
        ([["a", "b", "c", "d"]] * 4, ["sample 0", "x1"]),
        (torch.tensor([[8.0, 8, 2, 20]] * 4), ["box 0 of sample 0", "no area", "32×32", "x1 < x2"]),
        (torch.tensor([[40.0, 8, 50, 20]] * 4), ["box 0 of sample 0", "no area"]),
        (torch.tensor([[0.0, 0, 8, math.nan]] * 4), ["box 0 of sample 0", "nan"]),
    ],
    ids=range(7),
)
def test_boxes(boxes: Any, parts: list[str]) -> None:
    with raises(InputError, *parts):
        guide_loss(guide={"prior": "boxes"}, boxes=boxes)


def test_missing_boxes() -> None:
    with raises(InputError, r"BoxPrior\(\)", "boxes=…", "None"):
        guide_loss(guide={"prior": BoxPrior()})


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: MaskPrior(torch.rand(2, 3, 4, 4)), ["template", r"\(2, 3, 4, 4\)"]),
        (lambda: MaskPrior(torch.ones(4, 8, 8) * 2), ["template of class 0", r"outside \[0, 1\]"]),
        (lambda: MaskPrior(torch.zeros(4, 8, 8)), ["template of class 0", "empty"]),
        (lambda: MaskPrior(empty="ignore"), ["empty='ignore'", "skip"]),  # type: ignore[arg-type]
        (lambda: guide_loss(guide={"prior": MaskPrior(torch.ones(3, 8, 8))}), ["3 regions", "4 classes"]),
    ],
    ids=range(5),
)
def test_templates(make: Callable[[], object], parts: list[str]) -> None:
    with raises(InputError, *parts):
        make()


# ----------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (torch.tensor([0, 1, 2, 4]), ["labels", "sample 3", "class 4", "0 to 3", "-100"]),
        (torch.tensor([0, -1, 2, 3]), ["labels", "sample 1", "class -1"]),
        (LABELS[:3], ["labels", "3 samples", "had 4"]),
        (torch.tensor(1), ["labels", "no batch axis"]),
        (LABELS.float(), ["labels", "float32", "integers"]),
        (torch.rand(4, 3), ["labels", r"\(4, 3\)", r"\(4, 4\)"]),
        (torch.tensor([[1, -1, -1, 1]] * 4), ["labels", "-1", r"\(labels \+ 1\) / 2"]),
        (torch.tensor([[1.0, 5, 0, 1]] * 4), ["labels", "5", r"\[0, 1\]"]),
    ],
    ids=range(8),
)
def test_labels(labels: Tensor, parts: list[str]) -> None:
    with raises(InputError, *parts):
        guide_loss(labels=labels, mask=MASKS)


@pytest.mark.parametrize("targets", [[4], [-1], [(4, 0)], [(0, 4)], torch.tensor([[0, -1]])])
def test_targets_out_of_range(targets: Any) -> None:
    with raises(InputError, "targets=", "samples 0 to 3", "classes 0 to 3"):
        guide_loss(guide={"targets": targets}, mask=MASKS)


# -------------------------------------------------------------- order and modes


def test_loss_before_forward() -> None:
    with raises(GuidanceError, "before a forward", r"model\(images\)"):
        ag.Guide(cnn()).loss(LABELS, mask=MASKS)


def test_loss_after_remove() -> None:
    model = cnn()
    guide = ag.Guide(model)
    model(IMAGES)
    guide.remove()
    with raises(GuidanceError, "removed", "new one"):
        guide.loss(LABELS, mask=MASKS)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layer", ["auto", "block3"])
def test_a_forward_without_gradients(context: Any, layer: str) -> None:
    model = cnn().eval()
    guide = ag.Guide(model, layer=layer)
    with context():
        model(IMAGES)
    with raises(GuidanceError, "no_grad", "inference_mode", "validation"):
        guide.loss(LABELS, mask=MASKS)
    model(IMAGES)  # and on it goes
    guide.loss(LABELS, mask=MASKS).backward()


def test_a_model_that_switches_gradients_off_by_itself() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = cnn().block1, nn.Linear(4, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.trunk(images)
            return self.head(features.mean(dim=(2, 3)))

    model = Probe()
    guide = ag.Guide(model, layer="trunk")
    model(IMAGES)
    with raises(GuidanceError, "'trunk'", "switches gradients off"):
        guide.loss(LABELS, mask=MASKS)
    with raises(GuidanceError, "no graph"):
        ag.explain(model, IMAGES, layer="trunk")


# ----------------------------------------------------------------------- layers


class WithIdler(nn.Module):
    """A model with a layer that never runs, and one that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.idler, self.aside = cnn(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.aside(images)
        return self.body(images)


@pytest.mark.parametrize(
    ("layer", "kind", "parts"),
    [
        ("idler", LayerError, ["'idler'", "did not run", "body.block4"]),
        ("body.head", LayerError, ["'body.head'", r"\(1, 4\)", "rows and columns", "32×32", "body.block4"]),
        ("body.pool", LayerError, ["'body.pool'", "rows and columns"]),
        ("aside", LayerError, ["'aside'", "do not depend"]),
    ],
)
def test_layers(layer: str, kind: Any, parts: list[str]) -> None:
    model = WithIdler().eval()
    before = snapshot(model)
    with ag.Guide(model, layer=layer), raises(kind, *parts):
        model(IMAGES)
    with raises(kind, *parts):
        ag.explain(model, IMAGES, layer=layer)
    assert snapshot(model) == before


def test_a_layer_that_gives_no_tensor() -> None:
    model = nn.Sequential(Wrapped(lambda logits, _: {"logits": logits}), Wrapped2())
    with ag.Guide(model, layer="0"), raises(LayerError, "'0'", "rows and columns"):
        model(IMAGES)


class Wrapped2(nn.Module):
    def forward(self, output: Any) -> Any:
        return output["logits"]


def test_a_model_without_anywhere_to_look() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES))
    with raises(LayerError, "Sequential", "no layer", "layer='…'"):
        ag.explain(model, IMAGES)


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("pack", "parts"),
    [
        (lambda logits, _: "cat", ["no logits", "str"]),
        (lambda logits, _: {"score": "cat"}, ["no logits", "dict"]),
        (lambda logits, _: {"logits": None}, ["no logits", "dict"]),
        (lambda logits, _: (), ["no logits", "tuple"]),
        (lambda logits, images: images, [r"\(\d, 3, 32, 32\)", r"\(B, K\)"]),
    ],
    ids=range(5),
)
def test_outputs(pack: Callable[..., Any], parts: list[str]) -> None:
    model = Wrapped(pack)
    with raises(GuidanceError, *parts):
        ag.explain(model, IMAGES, layer="body.block4")
    with ag.Guide(model, layer="body.block4"), raises(GuidanceError, *parts):
        model(IMAGES)


def test_inputs_without_images() -> None:
    class Text(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.float()

    model = Text()
    with ag.Guide(model), raises(InputError, "no image tensor", "Tensor"):
        model(torch.zeros(2, 4))


# ---------------------------------------------------------------------- explain


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"images": IMAGES[0]}, InputError, [r"\(3, 32, 32\)", r"images\[None\]"]),
        ({"images": IMAGES[:0]}, InputError, ["at least one image"]),
        ({"images": [IMAGES[0]]}, InputError, ["images", "list"]),
        ({"source": "gradcam"}, UnknownNameError, ["mean 'grad_cam'"]),
        ({"targets": "labels"}, InputError, ["labels=…"]),
        ({"targets": [9]}, InputError, [r"targets=\[9\]", "0 to 3"]),
        ({"evidence": "no"}, InputError, ["evidence='no'"]),
        ({"size": "big"}, InputError, ["size='big'", "height, width"]),
        ({"size": (0, 4)}, InputError, [r"size=\(0, 4\)"]),
        ({"size": 7}, InputError, ["size=7"]),
        ({"layer": "block9"}, LayerError, ["'block9'", "mean 'block"]),
        ({"labels": torch.tensor([0, 1, 2, 9]), "targets": "labels"}, InputError, ["labels", "class 9"]),
    ],
    ids=range(12),
)
def test_explain(options: dict[str, Any], kind: Any, parts: list[str]) -> None:
    with raises(kind, *parts):
        ag.explain(cnn(), **{"images": IMAGES, **options})


# --------------------------------------------------------------- strangers' parts


class Shapeless(GradCAM):
    def __call__(self, trace: Any, pairs: Any) -> Tensor:
        return super().__call__(trace, pairs)[:, :2]


class SumLoss(ag.AlignmentLoss):
    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        return (attribution - prior).square().sum()


def prior_that_gives(answer: Callable[[int, tuple[int, int]], Any]) -> ag.TargetPrior:
    class Odd(ag.TargetPrior):
        def __call__(self, trace: Any, pairs: Any, size: tuple[int, int]) -> Any:
            return answer(len(pairs), size)

    return Odd()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"source": Shapeless()}, ["Shapeless", r"\(4, 2, 4\)", r"\(4, 4, 4\)"]),
        ({"loss": SumLoss()}, ["SumLoss", r"\(\)", "4 pairs"]),
        ({"prior": prior_that_gives(lambda n, s: torch.ones(n, 2, 2))}, ["Odd", r"\(4, 2, 2\)"]),
        ({"prior": prior_that_gives(lambda n, s: torch.ones(n, *s) * 2)}, ["Odd", r"outside \[0, 1\]"]),
        ({"prior": prior_that_gives(lambda n, s: torch.full((n, *s), math.nan))}, ["Odd", "NaN"]),
        ({"prior": prior_that_gives(lambda n, s: (torch.ones(n, *s), torch.ones(1)))}, ["Odd", r"\(1,\)"]),
        ({"prior": prior_that_gives(lambda n, s: (torch.ones(n, *s), -torch.ones(n)))}, ["Odd", "weight"]),
        ({"prior": prior_that_gives(lambda n, s: None)}, ["Odd", "None", "PriorMaps"]),
        ({"prior": prior_that_gives(lambda n, s: [1, 2, 3])}, ["Odd", "PriorMaps"]),
    ],
    ids=range(9),
)
def test_parts_of_others(options: dict[str, Any], parts: list[str]) -> None:
    annotations = {} if "prior" in options else {"mask": MASKS}
    with raises(GuidanceError, *parts):
        guide_loss(guide=options, **annotations)


def test_a_source_of_another_shape_cannot_explain_either() -> None:
    with raises(GuidanceError, "Shapeless", r"\(4, 2, 4\)"):
        ag.explain(cnn(), IMAGES, Shapeless())


# ------------------------------------------------------------------------ check


def test_check_tells_why_nothing_is_reached() -> None:
    model = cnn()
    with raises(GuidanceError, "no weight", "annotated", "frozen"):
        ag.Guide(model).check(IMAGES, LABELS, mask=None)
    model.requires_grad_(False)
    with raises(GuidanceError, "frozen|no_grad"):
        ag.Guide(model).check(IMAGES, LABELS, mask=MASKS)
