"""Faithfulness and stability of maps by the measures of pytorch-grad-cam and captum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnguide import functional
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import InputError
from attnguide.interfaces import AttributionSource

__all__ = ["confidence_change", "road", "sensitivity"]


def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    percentiles: Sequence[int] = (20, 50, 80),
) -> Tensor:
    """ROAD, "remove and debias": does the model miss what the map marks, and only that?

    The pixels of the highest values, and those of the lowest, are replaced by what their neighbourhood lets
    expect; half the difference of what is then left of the probability (Rong et al., ICML 2022). Computed by
    pytorch-grad-cam. Each percentile solves two linear systems of the size of the image: a second or more.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        maps: `(B, H, W)`, of the size of the images.
        classes: Class of each map, `(B,)`, int64.
        percentiles: Percentages of pixels that are replaced; the mean over them is returned.

    Returns:
        `(B,)` in [−1, 1]; higher is better, and 0 is that of a random map.

    Raises:
        InputError: If pytorch-grad-cam is not installed, or shapes do not fit.
    """
    with _foreign(model, images, maps, classes) as (probabilities, targets):
        from pytorch_grad_cam.metrics.road import ROADCombined

        measure = ROADCombined(percentiles=list(percentiles))
        values = measure(images, functional.min_max(maps).cpu().numpy(), targets, probabilities)
    return torch.as_tensor(values, dtype=torch.float32, device=images.device)


def confidence_change(model: nn.Module, images: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
    """Return how the probability changes when an image is multiplied by its map, scaled to [0, 1].

    Computed by pytorch-grad-cam.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, standardised, so that 0 is the mean colour.
        maps: `(B, H, W)`, of the size of the images.
        classes: Class of each map, `(B,)`, int64.

    Returns:
        `(B,)` in [−1, 1]; above 0 if the model is surer of what the map leaves.

    Raises:
        InputError: If pytorch-grad-cam is not installed, or shapes do not fit.
    """
    with _foreign(model, images, maps, classes) as (probabilities, targets):
        from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange

        measure = CamMultImageConfidenceChange()
        values = measure(images, functional.min_max(maps).cpu().numpy(), targets, probabilities)
    return torch.as_tensor(values, dtype=torch.float32, device=images.device)


def sensitivity(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    source: str | AttributionSource = "grad_cam",
    layer: str | list[str] = "auto",
    *,
    radius: float = 0.02,
    samples: int = 5,
) -> Tensor:
    """Return how much the map changes, at most, when the image hardly does (Yeh et al., NeurIPS 2019).

    Computed by captum. The model runs in evaluation mode and comes back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        classes: Class of each map, `(B,)`, int64.
        source: Attribution source.
        layer: Layer of the source.
        radius: Largest change of a value of the images.
        samples: Number of changed copies of each image.

    Returns:
        `(B,)`, at least 0: the largest norm of the change, as a share of the norm of the map; low is stable.
    """
    from captum.metrics import sensitivity_max

    from attnguide.explanation import explain  # which is built on this package's neighbours

    def attributed(inputs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, ...]:
        pairs = list(enumerate(target.tolist()))
        return (explain(model, inputs[0], source, pairs, layer).maps,)

    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        values: Tensor = sensitivity_max(
            attributed, (images,), perturb_radius=radius, n_perturb_samples=samples, target=classes
        )
    return values.detach().nan_to_num(0.0)  # a map of zeros that stays one does not change


class _Probabilities(nn.Module):
    """A classifier's probabilities: softmax, or sigmoid of a single logit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        logits = find_logits(self.model(images)).float()
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


@contextmanager
def _foreign(
    model: nn.Module, images: Tensor, maps: Tensor, classes: Tensor
) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Run a measure of pytorch-grad-cam on a model, which comes back as it was; draws are always the same."""
    if maps.shape != (len(images), *images.shape[-2:]) or classes.shape != (len(images),):
        raise InputError(
            f"images {tuple(images.shape)}, maps {tuple(maps.shape)} and classes {tuple(classes.shape)} do "
            "not fit: give (B, C, H, W), (B, H, W) and (B,)."
        )
    try:
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise InputError("this measure needs pytorch-grad-cam: pip install 'attnguide[grad-cam]'.") from error
    model = unwrap(model)
    with ExitStack() as stack:
        contexts = (torch.random.fork_rng([]), torch.no_grad(), evaluating(model), aside(model))
        for context in (*contexts, warnings.catch_warnings()):
            stack.enter_context(context)
        warnings.simplefilter("ignore")  # it calls numpy in ways of old
        torch.manual_seed(0)
        yield _Probabilities(model), [ClassifierOutputTarget(cls) for cls in classes.tolist()]
