"""What one forward pass left behind: images, logits, and the features of the layers asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnguide.errors import GuidanceError, LayerError
from attnguide.pairs import Pairs

__all__ = ["Feature", "Layout", "Trace"]


@dataclass(frozen=True)
class Layout:
    """How a layer's output is arranged in space.

    Attributes:
        kind: `"nchw"`, `"nhwc"`, or `"tokens"` (B, prefix + h·w, C) in raster order.
        grid: Rows and columns, `(h, w)`.
        prefix: Number of tokens before the patches (class token, registers …).
    """

    kind: Literal["nchw", "nhwc", "tokens"]
    grid: tuple[int, int]
    prefix: int = 0

    def spatial(self, output: Tensor) -> Tensor:
        """View an output in the model's own layout as `(B, C, h, w)`; no copy."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        patches = output[:, self.prefix :].transpose(1, 2)
        return patches.view(*patches.shape[:2], *self.grid)

    def __str__(self) -> str:
        prefix = f", {self.prefix} prefix" if self.prefix else ""
        return f"{self.kind} {self.grid[0]}×{self.grid[1]}{prefix}"


@dataclass(frozen=True)
class Feature:
    """The output of one layer, still attached to the graph.

    Attributes:
        layer: Name of the module, as in `model.named_modules()`.
        parts: The output as the model gave it: one tensor, or one for each device under `DataParallel`, in
            batch order.
        layout: Where rows, columns and channels are.
    """

    layer: str
    parts: tuple[Tensor, ...]
    layout: Layout

    @property
    def spatial(self) -> Tensor:
        """The feature as `(B, C, h, w)`; a view of the model's own tensor, on the first part's device."""
        return self.layout.spatial(_joined(self.parts))


@dataclass(frozen=True)
class Trace:
    """One forward pass, as an attribution source or a target prior sees it.

    Attributes:
        images: What the model was given, `(B, C, H, W)`.
        logits: What it answered, `(B, K)`, attached to the graph.
        features: The captured layers by name, in the order asked for.
        differentiable: Whether gradients computed here are part of the graph themselves (training), or end
            here (explaining).
    """

    images: Tensor
    logits: Tensor
    features: Mapping[str, Feature]
    differentiable: bool = False

    def at(self, *layers: str) -> Trace:
        """Return the same pass with only the named layers."""
        return replace(self, features={name: self.features[name] for name in layers})

    @property
    def feature(self) -> Feature:
        """The captured layer, where there is exactly one.

        Raises:
            LayerError: If there are several layers, or none.
        """
        if len(self.features) != 1:
            raise LayerError(f"this part reads one layer, but the trace has {list(self.features)}.")
        return next(iter(self.features.values()))

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of the images, `(H, W)`."""
        return self.images.shape[-2], self.images.shape[-1]

    def scores(self, pairs: Pairs) -> Tensor:
        """Evidence of each pair, `(N,)`: its logit, times the pair's sign."""
        return self.logits[pairs.sample, pairs.cls] * pairs.sign

    def gradients(self, pairs: Pairs, feature: Feature | None = None) -> Tensor:
        """Gradient of each pair's score with respect to a feature.

        Autograd starts at the feature: whatever lies before it is not touched. All samples share a pass, so
        that there are as many passes through the tail as one sample has classes. (Batch normalisation in
        training mode *after* the feature couples samples; the coupling is part of the result, as in every CAM
        implementation.)

        Args:
            pairs: N pairs.
            feature: The feature; the trace's only one if left out.

        Returns:
            `(N, C, h, w)`, part of the graph if the trace is differentiable.

        Raises:
            GuidanceError: If the logits have no graph, or do not depend on the feature.
        """
        feature = feature or self.feature
        if not self.logits.requires_grad:
            raise GuidanceError(
                "the logits have no graph: the model ran under torch.no_grad() or inference_mode(), or no "
                "parameter requires a gradient. Run the forward with gradients enabled."
            )
        if not all(part.requires_grad for part in feature.parts):
            raise GuidanceError(
                f"layer {feature.layer!r} ran without a graph, although the logits have one: the model "
                "itself switches gradients off for a part of its forward. Choose a layer that runs after "
                "it."
            )
        passes = []
        for slot in range(pairs.slots):
            with torch.enable_grad():
                scores = self.scores(pairs)
                # Masking rather than indexing: the shape then needs no answer from the device.
                total = scores.sum() if pairs.slots == 1 else torch.where(pairs.slot == slot, scores, 0).sum()
            found = torch.autograd.grad(
                total, feature.parts, create_graph=self.differentiable, retain_graph=True, allow_unused=True
            )
            if any(part is None for part in found):
                raise GuidanceError(
                    f"the logits do not depend on layer {feature.layer!r}. Choose a layer that the output "
                    "is computed from."
                )
            passes.append(feature.layout.spatial(_joined(found)))
        if not passes:
            return feature.spatial[:0]
        return passes[0][pairs.sample] if len(passes) == 1 else torch.stack(passes)[pairs.slot, pairs.sample]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
