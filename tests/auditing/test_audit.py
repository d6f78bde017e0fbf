"""The audit flags a model that was gamed on purpose, and passes an honest one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.models import batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.auditing.audit import AuditReport, Reliance
from attnguide.errors import InputError
from attnguide.sources.grad_cam import HiResCAM
from attnguide.testing import snapshot

SIDE, CLASSES = 16, 3
#: Where to look: the left half. The right half holds the shortcut.
MASK = torch.zeros(SIDE, SIDE)
MASK[:, : SIDE // 2] = 1


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise; on the left a bar whose place shows the class, on the right a brightness that does so too."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 + 5 * label : 5 + 5 * label, 1:7] += 0.7
        image[0, :, 12:] += label - 1  # out of sight of the layer's cells on the left
    return images, labels


class Body(nn.Sequential):
    """Convolutions, and a linear layer that knows places."""

    def __init__(self) -> None:
        convolutions = [
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
        ]
        super().__init__(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, CLASSES))


class TwoPaths(nn.Module):
    """A network whose layer is guided, and a second path that nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.second = nn.Linear(1, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        brightness = images[..., SIDE // 2 :].mean(dim=(1, 2, 3))[:, None]
        return self.body(images) + 10 * self.second(10 * brightness)  # the easier path


@cache
def trained(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = TwoPaths() if kind == "gamed" else Body()
    guide = None
    if kind != "unguided":
        layer, source = ("body.4" if kind == "gamed" else "4"), HiResCAM(relu=kind == "rectified")
        guide = ag.Guide(model, source=source, layer=layer, loss="outside", weight=20.0, targets="all")
    images, labels = shapes(512, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[index]), labels[index])
            if guide is not None:
                loss = loss + guide.loss(labels[index], mask=MASK)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if guide is not None:
        guide.remove()
    return model.eval()


def audited(kind: str, before: AuditReport | None = None) -> AuditReport:
    images, labels = shapes(96, 2)
    layer = "body.4" if kind == "gamed" else "4"
    return ag.audit(trained(kind), images, labels, MASK, source="hires_cam", layer=layer, before=before)


@pytest.mark.slow
def test_an_unguided_model_does_not_pretend() -> None:
    report = audited("unguided")
    assert report.reliance > 0.3
    assert not report.looks_right
    assert not report.gamed


@pytest.mark.slow
@pytest.mark.parametrize("compared", [False, True])
def test_an_honest_model_passes(compared: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = audited("guided", audited("unguided") if compared else None)
    assert report.looks_right
    assert report.reliance < 0.1
    assert report.inside > 0.5
    assert not report.gamed
    assert "predictions that depend on what is outside" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("kind", ["gamed", "rectified"])
def test_a_gamed_model_is_flagged(kind: str, compared: bool) -> None:
    """By a second path; or by evidence against the other classes, which a rectified map does not show."""
    with pytest.warns(ag.AuditWarning, match="the map looks right, but .*outside the mask"):
        report = audited(kind, audited("unguided") if compared else None)
    assert report.looks_right
    assert report.gamed
    assert "The map looks right, but" in str(report)


@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_a_guide_audits_with_its_own_parts_and_changes_nothing(build: type) -> None:
    model, (images, labels, masks) = build().eval(), batch(8)
    labels = torch.arange(8) % 4
    before = snapshot(model)
    with ag.Guide(model, source="grad_cam", loss="energy") as guide:
        model(images)
        value = guide.loss(labels, mask=masks)
        report = guide.audit(images, labels, mask=masks, tolerance=1.0)
        again = ag.audit(model, images, labels, masks, source="grad_cam", tolerance=1.0)
        torch.testing.assert_close(guide.loss(labels, mask=masks), value)  # still that of the forward before
    assert snapshot(model) == before
    assert report.optimized == pytest.approx(again.optimized, abs=1e-5)
    assert report.witnesses == pytest.approx(again.witnesses, abs=1e-5)
    assert (report.pairs, report.n_swaps) == (8, 8)
    assert report.uniform == pytest.approx(float(masks.mean()))
    shown = ag.explain(model, images, "grad_cam", "labels", labels=labels).maps[:, 0]
    assert report.optimized == pytest.approx(float(ag.metrics.energy_in_mask(shown, masks).mean()), abs=1e-5)


def test_attributes_and_missing_masks() -> None:
    model, (images, _, masks) = cnn(), batch(4)
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    masks = masks.clone()
    masks[3] = torch.nan
    report = ag.audit(model, images, labels, masks, tolerance=1.0)
    assert (report.pairs, report.n_swaps) == (3, 3)
    with ag.Guide(model) as guide:
        own = guide.audit(images, labels, mask=[*masks[:3].unbind(), None], tolerance=1.0)
    assert own.optimized == pytest.approx(report.optimized, abs=1e-5)
    assert own.reliance == report.reliance


def test_a_partner_has_another_prediction_about_the_class_in_question() -> None:
    """An attribute that nearly all have, shown by one pixel outside the mask: every swap turns it."""

    class Pixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = cnn(classes=8)

        def forward(self, images: Tensor) -> Tensor:
            logits = self.body(images) * 1e-3
            return torch.cat([images[:, :1, 0, 0] - 0.5, logits[:, 1:]], dim=1)

    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(100, 8, generator=generator) < 0.5).float()
    labels[:, 0] = 1.0
    labels[::20, 0] = 0.0
    images = torch.rand(100, 3, 32, 32, generator=generator)
    images[:, 0, 0, 0] = labels[:, 0]
    mask = torch.ones(32, 32)
    mask[0, 0] = 0
    report = ag.audit(Pixel(), images, labels, mask, targets=[0], layer="body.block4", tolerance=1.0)
    assert report.reliance == 1.0
    assert report.n_swaps == 100


class Reads(nn.Module):
    """Logits that are known, beside a body that a map can be made of and that adds almost nothing."""

    def __init__(self, read: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.body, self.read = cnn(classes=classes), read

    def forward(self, images: Tensor) -> Tensor:
        return self.read(images) + 1e-6 * self.body(images)


def known(read: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, masks: Tensor) -> AuditReport:
    classes = read(images[:1]).shape[1]
    return ag.audit(Reads(read, classes), images, labels, masks, layer="body.block4")


@pytest.mark.filterwarnings("ignore::attnguide.AuditWarning")
def test_the_object_of_another_image_is_not_brought_in() -> None:
    """A square of one of three colours, anywhere, on black; the model takes the colour of all there is."""
    labels = torch.arange(60) % 3
    images, masks = torch.zeros(60, 3, 32, 32), torch.zeros(60, 32, 32)
    places = torch.randint(26, (60, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for image, mask, label, (row, column) in zip(images, masks, labels.tolist(), places, strict=True):
        image[label, row : row + 6, column : column + 6] = 1
        mask[row : row + 6, column : column + 6] = 1
    report = known(lambda images: images.mean(dim=(2, 3)), images, labels, masks)
    assert (report.reliance, report.inside, report.n_swaps) == (0.0, 1.0, 60)


@pytest.mark.filterwarnings("ignore::attnguide.AuditWarning")
def test_predictions_that_noise_changes_do_not_count() -> None:
    """The mean in the mask depends on the class; the rest is noise that the model cannot separate from it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    images = torch.randn(400, 3, 32, 32, generator=generator)
    images[..., :16] += 0.03 * (2 * labels[:, None, None, None] - 1)
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1

    def read(images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)

    report = known(read, images, labels, mask)
    assert report.outside.chance > 0.05
    assert not report.outside.exceeds(0.3)
    blind = known(lambda images: read(images * mask), images, labels, mask)
    assert (blind.reliance, blind.outside.chance) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore::attnguide.AuditWarning")
@pytest.mark.parametrize("targets", ["labels", "all"])
def test_a_shortcut_that_is_enough_alone_is_found(targets: str) -> None:
    """Present by the mask or by a watermark: positives keep their prediction, whatever is swapped."""
    labels = (torch.arange(80) % 2).float()[:, None]
    images = torch.zeros(80, 3, 32, 32)
    images[..., 8:16, 8:16] = labels[:, :, None, None]
    images[..., 0, 0] = labels
    mask = torch.zeros(32, 32)
    mask[8:16, 8:16] = 1
    model = Reads(lambda images: torch.maximum(images[:, :1, 0, 0], images[:, :1, 10, 10]) - 0.5, 1)
    found = ag.audit(model, images, labels, mask, layer="body.block4", targets=targets, tolerance=0.4)
    assert found.reliance == pytest.approx(0.5)
    assert found.reasons


@pytest.mark.filterwarnings("ignore::attnguide.AuditWarning")
def test_one_class_of_many_is_found() -> None:
    """Eleven attributes are read inside, one outside; their mean would pass."""
    labels = (torch.rand(60, 12, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    images = torch.zeros(60, 3, 32, 32)
    images[:, :, 16, :12] = labels[:, None]
    mask = torch.zeros(32, 32)
    mask[16:, 1:] = 1
    report = known(lambda images: images[:, 0, 16, :12] - 0.5, images, labels, mask)
    assert report.reliance < report.tolerance
    assert [cls for cls, one in report.by_class.items() if one.exceeds(0.1)] == [0]
    assert report.reasons == [
        "100% of the predictions about class 0 depend on what is outside the mask (limit 10%)"
    ]


def report_of(**values: Any) -> AuditReport:
    """A report of a model whose map looks right, and that is honest."""
    outside = Reliance(values.pop("share", 0.0), values.pop("error", 0.01), 0.0, 100)
    common: dict[str, Any] = {"source": "grad_cam", "optimized": 0.9, "blank": 0.0, "inside": 1.0}
    common |= {"witnesses": {"input_gradient": 0.8, "occlusion": 0.9}, "by_class": {}, "uniform": 0.2}
    common |= {"outside": outside, "pairs": 100, "tolerance": 0.1}
    return AuditReport(**(common | values))


def test_what_contradicts_a_map() -> None:
    assert not report_of().gamed
    assert report_of(share=0.5).gamed
    assert not report_of(share=0.5, error=0.25).gamed  # it may be chance
    # A large mask leaves little to gain; a blank map shows nothing outside.
    assert report_of(share=1.0, uniform=0.98, optimized=1.0).gamed
    assert not report_of(share=1.0, uniform=0.98, optimized=0.98).gamed
    assert report_of(share=1.0, uniform=0.98, optimized=0.5, blank=0.5).gamed
    assert not report_of(share=1.0, optimized=0.2).gamed
    # Guidance that left a quarter of the reliance passes, one that left half does not.
    before = report_of(share=0.9, optimized=0.4, witnesses={"input_gradient": 0.3, "occlusion": 0.4})
    assert not report_of(share=0.2, before=before).gamed
    assert report_of(share=0.45, before=before).gamed
    # Witnesses that were right already need not follow; those that did not tip the scales.
    unsure = {"share": 0.5, "error": 0.25}
    followed = report_of(**unsure, before=before)
    assert not followed.gamed
    stayed = report_of(**unsure, before=before, witnesses=before.witnesses)
    assert stayed.gamed
    assert "gained +0.50" in str(stayed)
    # What was blank before and shows the mask now has gained.
    blank = report_of(share=1.0, optimized=0.0, blank=1.0)
    assert report_of(share=1.0, before=blank).gamed
    assert "The map does not look right, and 100%" in str(report_of(share=1.0, optimized=0.2))
    honest = report_of(optimized=0.5, witnesses={"input_gradient": 0.8, "occlusion": 0.95})
    assert not report_of(before=honest, witnesses={"input_gradient": 0.8, "occlusion": 0.95}).gamed


def test_the_report_is_a_table_in_a_notebook() -> None:
    before = report_of(share=0.9, optimized=0.4, witnesses={"input_gradient": 0.3, "occlusion": 0.4})
    shown = ElementTree.fromstring(f"<div>{report_of(share=0.45, before=before)._repr_html_()}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in shown.findall(".//tbody/tr")]
    assert rows[0] == ["energy of grad_cam in the mask (optimized)", "90.0%", "40.0%"]
    assert ["energy of a uniform map", "20.0%", ""] in rows
    assert "depend on what is outside the mask" in "".join(shown.itertext())
    assert "The map" not in report_of()._repr_html_()


def test_no_more_images_at_once_than_allowed() -> None:
    model, images = cnn(), torch.rand(20, 3, 32, 32)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    whole = ag.audit(model, images, torch.arange(20) % 4, torch.ones(32, 32), tolerance=1.0, window=16)
    sizes.clear()
    parts = ag.audit(
        model, images, torch.arange(20) % 4, torch.ones(32, 32), tolerance=1.0, window=16, batch_size=6
    )
    assert max(sizes) <= 6
    assert parts.witnesses == pytest.approx(whole.witnesses, abs=1e-5)


def test_bad_input() -> None:
    model, (images, labels, masks) = cnn(), batch(4)
    with pytest.raises(InputError, match="no two images are of different classes"):
        ag.audit(model, images, torch.zeros(4).long(), masks)
    with pytest.raises(InputError, match="do not fit 4 images"):
        ag.audit(model, images, labels, masks[:3])
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        ag.audit(model, images, labels, masks * 255)
    with pytest.raises(InputError, match="nothing to audit"):
        ag.audit(model, images, labels, masks * torch.nan)
    with ag.Guide(model) as guide, pytest.raises(InputError, match="mask"):
        guide.audit(images, labels)


@pytest.mark.parametrize("term", [5, -1, "0", None])
def test_a_term_that_is_not_there(term: Any) -> None:
    model, (images, labels, masks) = cnn(), batch()
    with ag.Guide(model) as guide, pytest.raises(InputError, match=f"term={term!r} is not one of the terms"):
        guide.audit(images, labels, term=term, mask=masks)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("tolerance", (float("nan"), -1, 2, "a")),
        ("window", (0, -1, 1.5, "a")),
        ("batch_size", (0, -1, "a", None)),
        ("before", (3,)),
    ],
)
def test_settings_out_of_range(setting: str, values: tuple[Any, ...]) -> None:
    model, (images, labels, masks) = cnn(), batch()
    for value in values:
        with pytest.raises(InputError, match=f"{setting}="):
            ag.audit(model, images, labels, masks, **{setting: value})
    with pytest.raises(InputError, match="images must be a tensor"):
        ag.audit(model, images[0], labels, masks)
