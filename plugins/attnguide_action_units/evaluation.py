"""Measures how well attributions match the action units: ATT-COS and CAM-COS of arXiv 2402.00281."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.interfaces import AttributionSource
from attnguide.sources.layer_attention import LayerAttention
from attnguide_action_units.prior import ActionUnitPrior

__all__ = ["CAMS", "Report", "evaluate"]

#: Sources of the class activation maps for CAM-COS.
CAMS: tuple[str, ...] = ("cam", "grad_cam", "grad_cam_plus_plus", "layer_cam")


@dataclass(frozen=True)
class Report:
    """Results of an evaluation.

    Attributes:
        accuracy: Share of the samples whose class is predicted.
        attention: ATT-COS for each layer: mean cosine of layer attention and action-unit map.
        cams: CAM-COS for each source: mean cosine of the class activation map of the true class and the
            action-unit map, at the last of the layers.
        samples: Number of samples.
        compared: Number of samples with an action-unit map; if it is 0, the means are NaN.
    """

    accuracy: float
    attention: dict[str, float]
    cams: dict[str, float]
    samples: int
    compared: int

    def __str__(self) -> str:
        lines = [f"accuracy {self.accuracy:.1%} of {self.samples}; maps of {self.compared} compared"]
        lines += [f"ATT-COS {name}: {value:.3f}" for name, value in self.attention.items()]
        lines += [f"CAM-COS {name}: {value:.3f}" for name, value in self.cams.items()]
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Any]],
    prior: ActionUnitPrior,
    *,
    layers: str | Sequence[str] = "auto",
    cams: Sequence[str | AttributionSource] = CAMS,
) -> Report:
    """Measure accuracy, ATT-COS at layers, and CAM-COS.

    Cosines are taken at the resolution of the layer, over the samples whose prior has a weight above 0.

    Args:
        model: A classifier; it runs in evaluation mode, and its state is restored.
        batches: Batches of images, labels and landmarks, on the model's device.
        prior: The prior, with the expression of each class.
        layers: Layers whose attention is measured; activation maps are computed at the last of them.
        cams: Sources of activation maps; the source that guided the training says nothing about its success.

    Returns:
        Accuracy and mean cosines.

    Raises:
        InputError: If there are no batches.
    """
    sums: dict[tuple[str, str], float] = defaultdict(float)
    right, samples, compared = 0, 0, 0
    for images, labels, landmarks in batches:
        attention = explain(model, images, LayerAttention(), "labels", layers, size=None, labels=labels)
        right += int((attention.logits.argmax(dim=1) == labels).sum())
        samples += len(labels)
        maps = {("attention", name): raw for name, raw in attention.raw.items()}
        last = list(attention.raw)[-1]
        for source in cams:
            cam = explain(model, images, source, "labels", last, size=None, labels=labels)
            maps["cams", str(source)] = cam.raw[last]
        drawn: dict[tuple[int, int], Tensor] = {}
        for key, raw in maps.items():
            size = (raw.shape[-2], raw.shape[-1])
            if size not in drawn:
                image_size = (images.shape[-2], images.shape[-1])
                drawn[size], weights = prior.draw(landmarks, labels, size, image_size)
            cosines = F.cosine_similarity(raw[:, 0].flatten(1).float(), drawn[size].flatten(1), dim=1)
            sums[key] += float((cosines * (weights > 0)).sum())
        compared += int((weights > 0).sum())
    if not samples:
        raise InputError(
            "there are no batches to evaluate on; give at least one (images, labels, landmarks)."
        )
    means: dict[str, dict[str, float]] = {"attention": {}, "cams": {}}
    for (kind, name), total in sums.items():
        means[kind][name] = total / compared if compared else float("nan")
    return Report(right / samples, means["attention"], means["cams"], samples, compared)
