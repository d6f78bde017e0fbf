"""Masks and boxes of every form; and what is missing drops out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.helpers.models import CLASSES, batch, cnn
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, Mask

import attnguide as ag
from attnguide.priors.boxes import BoxPrior
from attnguide.priors.mask import MaskPrior

NAN = math.nan


def value(model: Any, images: Tensor, labels: Tensor, prior: Any = "mask", **options: Any) -> float:
    with ag.Guide(model, prior=prior) as guide:
        model(images)
        return float(guide.loss(labels, **options).detach())


def prior_maps(prior: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
    """Prior maps (N, 4, 4) of the pairs of a batch of 4 images of 32 pixels."""
    images, default, _ = batch()
    model = cnn().eval()
    with ag.Guide(model, prior=prior) as guide:
        model(images)
        guide.loss(default if labels is None else labels, **options)
        return guide.records()[0].prior


# ----------------------------------------------------------------------- masks


def test_a_mask_is_averaged_over_the_cells_of_the_map() -> None:
    mask = torch.zeros(32, 32)
    mask[:8, :8] = 1  # cell (0, 0) whole
    mask[8:12, 8:16] = 1  # the upper half of cell (1, 1)
    mask[31, 31] = 1  # one pixel of 64
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[1, 1], expected[3, 3] = 1, 0.5, 1 / 64
    torch.testing.assert_close(prior_maps("mask", mask=mask), expected.expand(4, 4, 4))


def test_every_form_of_a_mask_means_the_same() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    expected = value(model, images, labels, mask=masks)
    per_class = torch.full((4, CLASSES, 32, 32), NAN)
    per_class[torch.arange(4), labels] = masks
    forms = {
        "(B, H, W)": masks,
        "(B, 1, H, W)": masks[:, None],
        "(B, K, H, W)": per_class,
        "bool": masks.bool(),
        "uint8": masks.byte(),
        "int64": masks.long(),
        "float16": masks.half(),
        "float64": masks.double(),
        "numpy": masks.numpy(),
        "numpy bool": masks.numpy().astype(bool),
        "numpy reversed": masks.numpy()[:, ::-1][:, ::-1],
        "tv_tensors": Mask(masks.bool()),
        "list": list(masks),
        "tuple": tuple(masks),
        "list of numpy": [mask.numpy() for mask in masks],
        "list of tv_tensors": [Mask(mask) for mask in masks],
        "list of (K, H, W)": list(per_class),
        "list of (1, H, W)": [mask[None] for mask in masks],
        "twice the size": masks.repeat_interleave(2, 1).repeat_interleave(2, 2),
        "the size of the map": torch.nn.functional.avg_pool2d(masks[:, None], 8)[:, 0],
        "different sizes": [
            mask.repeat_interleave(n + 1, 0).repeat_interleave(n + 1, 1) for n, mask in enumerate(masks)
        ],
    }
    found = {name: value(model, images, labels, mask=mask) for name, mask in forms.items()}
    assert found == pytest.approx(dict.fromkeys(forms, expected), rel=1e-5)


def test_one_mask_for_all() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    expected = value(model, images, labels, mask=masks[1].expand(4, 32, 32))
    assert value(model, images, labels, mask=masks[1]) == pytest.approx(expected, rel=1e-6)
    assert value(model, images, labels, MaskPrior(masks[1])) == pytest.approx(expected, rel=1e-6)


def test_a_template_gives_each_class_its_region() -> None:
    model = cnn().eval()
    images, _, masks = batch()
    labels = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    template = masks.clone()
    template[2] = NAN  # this class has none
    per_sample = template.expand(4, CLASSES, 32, 32)
    expected = value(model, images, labels, mask=per_sample)
    for form in (template, template.numpy()):
        assert value(model, images, labels, MaskPrior(form)) == pytest.approx(expected, rel=1e-6)
    # A mask that is passed comes before the template.
    assert value(model, images, labels, MaskPrior(template), mask=masks) == pytest.approx(
        value(model, images, labels, mask=masks), rel=1e-6
    )
    with ag.Guide(model, prior=MaskPrior(template)) as guide:
        model(images)
        guide.loss(labels)
        assert guide.records()[0].pairs.cls.tolist() == [0, 1, 3, 0, 3]


# --------------------------------------------------------- missing annotations

KEPT = [0, 3]


def lacking(masks: Tensor, how: str) -> dict[str, Any]:
    gone = [1, 2]
    nan, ignored, empty = masks.clone(), masks.clone(), masks.clone()
    nan[gone], ignored[gone], empty[gone] = NAN, -1, 0
    garbage = masks.clone()
    garbage[gone] = 255
    return {
        "None in a list": {"mask": [mask if n in KEPT else None for n, mask in enumerate(masks)]},
        "NaN": {"mask": nan},
        "NaN in a list": {"mask": list(nan)},
        "-1": {"mask": ignored},
        "weight": {"mask": masks, "sample_weight": torch.tensor([1, 0, 0, 1])},
        "weight per class": {
            "mask": masks,
            "sample_weight": torch.tensor([1.0, 0, 0, 1])[:, None].expand(4, CLASSES),
        },
        "weight over garbage": {"mask": garbage, "sample_weight": torch.tensor([1, 0, 0, 1])},
        "empty": {"mask": empty},
        "empty in a list": {"mask": list(empty)},
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "None in a list", "NaN", "NaN in a list", "-1", "weight", "weight per class", "weight over garbage",
        "empty", "empty in a list",
    ],
)  # fmt: skip
def test_pairs_without_annotation_drop_out(how: str) -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    prior = MaskPrior(empty="skip")
    expected = value(model, images[KEPT], labels[KEPT], mask=masks[KEPT])
    assert value(model, images, labels, prior, **lacking(masks, how)) == pytest.approx(expected, rel=1e-6)


def test_ignored_labels_drop_out_and_need_no_valid_mask() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    expected = value(model, images[KEPT], labels[KEPT], mask=masks[KEPT])
    labels[[1, 2]] = -100
    masks[1], masks[2, 3:5] = 0, 255
    for form in (masks, list(masks)):
        assert value(model, images, labels, mask=form) == pytest.approx(expected, rel=1e-6)


def test_boxes_without_annotation_drop_out() -> None:
    model = cnn().eval()
    images, labels, _ = batch()
    boxes = torch.tensor([[0.0, 0, 16, 16], [NAN] * 4, [-1] * 4, [8, 8, 30, 20]])
    expected = value(model, images[KEPT], labels[KEPT], "boxes", boxes=boxes[KEPT])
    for form in (boxes, [boxes[0], None, torch.empty(0, 4), boxes[3]], boxes[:, None]):
        assert value(model, images, labels, "boxes", boxes=form) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("prior", "annotations", "labels"),
    [
        ("mask", {"mask": None}, None),
        ("mask", {"mask": [None] * 4}, None),
        ("mask", {"mask": torch.full((4, 8, 8), NAN)}, None),
        ("mask", {"mask": torch.ones(8, 8)}, torch.full((4,), -100)),
        ("mask", {"mask": torch.ones(8, 8)}, torch.zeros(4, CLASSES)),
        ("mask", {"mask": torch.ones(8, 8), "sample_weight": torch.zeros(4)}, None),
        ("boxes", {"boxes": None}, None),
        ("boxes", {"boxes": torch.full((4, 4), NAN)}, None),
    ],
)
@pytest.mark.parametrize("source", ["grad_cam", "layer_attention"])
def test_without_any_annotation_the_loss_is_an_exact_zero(
    prior: str, annotations: dict[str, Any], labels: Tensor | None, source: str
) -> None:
    model = cnn().eval()
    images, default, _ = batch()
    with ag.Guide(model, source=source, prior=prior) as guide:
        model(images)
        loss = guide.loss(default if labels is None else labels, **annotations)
        assert float(loss.detach()) == 0.0
        assert loss.requires_grad
        loss.backward()
        (record,) = guide.records()
    assert len(record.pairs) == len(record.maps) == len(record.losses) == 0
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_weights_weigh() -> None:
    model = cnn().eval()
    images, labels, masks = batch()
    with ag.Guide(model) as guide:
        model(images)
        weight = torch.tensor([1.0, 2.0, 0.5, 0.0])
        loss = guide.loss(labels, mask=masks, sample_weight=weight)
        losses = guide.records()[0].losses
    assert losses.shape == (3,)
    assert float(loss.detach()) == pytest.approx(float((weight[:3] * losses).sum() / 3.5), rel=1e-6)


# ----------------------------------------------------------------------- boxes


def test_a_box_covers_its_share_of_each_cell() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 8, 16, 24], [-5, -5, 8, 4], [20, 20, 99, 99]])
    expected = torch.zeros(4, 4, 4)
    expected[0, 0, 0] = 1
    expected[1, 1:3, 0], expected[1, 1:3, 1] = 0.5, 1
    expected[2, 0, 0] = 0.5
    expected[3, 2, 2], expected[3, 2, 3], expected[3, 3, 2], expected[3, 3, 3] = 0.25, 0.5, 0.5, 1
    torch.testing.assert_close(prior_maps("boxes", boxes=boxes), expected)
    # The same region as a mask.
    pixels = torch.zeros(4, 32, 32)
    for sample, (x1, y1, x2, y2) in enumerate(boxes.clamp(0, 32).int().tolist()):
        pixels[sample, y1:y2, x1:x2] = 1
    torch.testing.assert_close(prior_maps("mask", mask=pixels), expected)


def test_every_form_of_boxes_means_the_same() -> None:
    boxes = torch.tensor([[0.0, 0, 16, 16], [4, 8, 12, 24], [2, 2, 9, 4], [20, 20, 30, 32]])
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    canvas = {"canvas_size": (32, 32)}
    padded = torch.full((4, 3, 4), NAN)
    padded[:, 1] = boxes
    forms = {
        "(B, n, 4)": boxes[:, None],
        "padded": padded,
        "int": boxes.int(),
        "numpy": boxes.numpy(),
        "list of lists": boxes.tolist(),
        "list of (4,)": list(boxes),
        "list of (n, 4)": [box[None].expand(n + 1, 4) for n, box in enumerate(boxes)],
        "list of numpy": [box.numpy() for box in boxes],
        "xywh": BoundingBoxes(torch.cat([boxes[:, :2], size], 1), format="XYWH", **canvas),
        "cxcywh": BoundingBoxes(torch.cat([centre, size], 1), format="CXCYWH", **canvas),
        "list of xywh": [
            BoundingBoxes(torch.cat([box[:2], box[2:] - box[:2]])[None], format="XYWH", **canvas)
            for box in boxes
        ],
    }
    expected = prior_maps("boxes", boxes=boxes)
    for name, form in forms.items():
        torch.testing.assert_close(
            prior_maps("boxes", boxes=form), expected, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_several_boxes_of_an_image_are_joined() -> None:
    boxes = [torch.tensor([[0.0, 0, 8, 8], [24, 24, 32, 32]]), None, None, None]
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, 0] = expected[0, 3, 3] = 1
    torch.testing.assert_close(prior_maps(BoxPrior(), boxes=boxes), expected)
