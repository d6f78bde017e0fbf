"""The object of an image by a normalized cut of a network's own features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import linalg, ndimage
from torch import Tensor, nn

from attnguide.capture.model_state import evaluating, weights_digest
from attnguide.capture.recorder import Plan, Recorder
from attnguide.errors import InputError, LayerError
from attnguide.interfaces import PriorMaps
from attnguide.layers import find_layers
from attnguide.models.loaded_model import LoadedModel
from attnguide.priors.finding import FindingPrior, own_copy
from attnguide.trace import Layer, trace_of

__all__ = ["TokenCutPrior", "token_cut"]

#: Weight of the edges between positions that are not alike, so that the graph holds together.
_APART = 1e-5
#: What the layer `"auto"` may be, and how many rows and columns are enough.
_AUTO, _FINE = ("auto", "stage:-2", "stage:-3"), 10


class TokenCutPrior(FindingPrior):
    """The object of an image, found without any annotation: TokenCut (Wang et al., CVPR 2022).

    Positions of a layer are cut into two groups, within which features are alike; see
    `token_cut`. The map is the same for every class. Vision transformers that
    were trained without labels separate objects best; any network with a feature map of at least 4×4 will do.

    Args:
        model: The network whose features are cut; it is copied. By default the guided model as it is at its
            first batch.
        layer: Layer of the features; `"auto"` is the deepest with at least 10 rows and columns.
        similarity: Cosine from which on two positions are alike.
        cache: Folder of regions; see [`FindingPrior`][attnguide.priors.FindingPrior].

    Raises:
        InputError: If the model is none, or the similarity is not in (−1, 1).
    """

    def __init__(
        self,
        model: nn.Module | LoadedModel | None = None,
        *,
        layer: str = "auto",
        similarity: float = 0.2,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(cache)
        if not isinstance(similarity, (int, float)) or not -1 < similarity < 1:
            raise InputError(f"similarity={similarity!r} must be a cosine in (−1, 1).")
        self.model = None if model is None else own_copy(model)
        self.layer, self.similarity = layer, similarity

    def prepare(self, model: nn.Module | None, classes: int) -> None:
        """Copy the guided model if no other was given."""
        if self.model is None:
            if model is None:
                raise InputError("prior 'token_cut' needs a model: TokenCutPrior(model).")
            self.model = own_copy(model)

    def settings(self) -> str:
        """Return layer, similarity and the model's weights."""
        return f"token_cut {self.layer} {self.similarity} {self.model and weights_digest(self.model)}"

    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        """Cut the features of each image."""
        features = self._features(images).float().cpu()
        masks = [token_cut(feature, self.similarity) for feature in features]
        maps = torch.stack([torch.zeros(features.shape[-2:]) if mask is None else mask for mask in masks])
        weights = torch.tensor([float(mask is not None) for mask in masks])
        return PriorMaps(maps.to(images.device), weights.to(images.device))

    def _features(self, images: Tensor) -> Tensor:
        """Run the network, and return the features of the layer `(N, C, h, w)`."""
        model = self.model
        if model is None:
            raise InputError("prior 'token_cut' needs a model: TokenCutPrior(model).")
        model.to(images.device)
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            layers = self._layers(model, images)
            recorder = Recorder(model, cut=False)
            try:
                recorder.record(Plan([layer.name for layer in layers], [], (), {}))
                model(images)
                trace = trace_of([*recorder.recordings.values()], layers, differentiable=False, model=model)
                return trace.feature.spatial.detach()
            finally:
                recorder.remove()

    def _layers(self, model: nn.Module, images: Tensor) -> list[Layer]:
        """Find the layer; `"auto"` is the deepest with enough positions to draw an object."""
        found: list[Layer] = []
        for name in _AUTO if self.layer == "auto" else (self.layer,):
            try:
                layers = find_layers(model, images, (name,))
            except LayerError:
                if not found:
                    raise
                break  # the network has no more stages
            if not found or min(layers[0].layout.grid) > min(found[0].layout.grid):
                found = layers
            if min(found[0].layout.grid) >= _FINE:
                break
        return found

    def __repr__(self) -> str:
        name = "" if self.model is None else type(self.model).__name__
        return f"TokenCutPrior({name}, layer={self.layer!r}, similarity={self.similarity})"


def token_cut(features: Tensor, similarity: float = 0.2) -> Tensor | None:
    """Find the object in a feature map by a normalized cut.

    Positions are the nodes of a graph, joined where the cosine of their features is at least `similarity`.
    The second smallest eigenvector of (D − W)x = λDx, cut at its mean, gives two groups (Shi and Malik 2000);
    the object is the one with the strongest value, and of it the connected part around that value. A group
    that holds three corners is the background instead.

    Args:
        features: `(C, h, w)`.
        similarity: Cosine from which on two positions are alike.

    Returns:
        Mask `(h, w)` of 0 and 1; None if all positions are alike, or the object fills nearly all or none of
        the image.

    Raises:
        InputError: If there are fewer than 4×4 positions.
    """
    height, width = features.shape[-2:]
    if min(height, width) < 4:
        raise InputError(
            f"a cut needs at least 4×4 positions, the layer has {height}×{width}. Name an earlier layer, "
            "such as 'stage:-2', or give larger images."
        )
    flat = F.normalize(features.detach().double().cpu().flatten(1), dim=0)
    alike = (flat.T @ flat).numpy() >= similarity
    if alike.all() or not (alike & ~np.eye(len(alike), dtype=bool)).any():
        return None
    weights = np.where(alike, 1.0, _APART)
    degree = np.diag(weights.sum(axis=1))
    _, vectors = linalg.eigh(degree - weights, degree, subset_by_index=[1, 1])
    vector = vectors[:, 0].reshape(height, width)
    inside = vector > vector.mean()
    if np.abs(vector[inside]).max(initial=0) < np.abs(vector[~inside]).max(initial=0):
        inside, vector = ~inside, -vector
    corners = inside[[0, 0, -1, -1], [0, -1, 0, -1]]
    if corners.sum() >= 3:
        inside, vector = ~inside, -vector
    part = _largest_part(inside, vector)
    share = part.mean()
    if not 0.01 <= share <= 0.9:
        return None
    return torch.from_numpy(part.astype(np.float32))


def _largest_part(inside: npt.NDArray[np.bool_], vector: Any) -> npt.NDArray[np.bool_]:
    """Return the connected part around the strongest value."""
    parts, count = ndimage.label(inside)
    if not count:
        return inside
    strongest = np.where(inside, np.abs(vector), -1.0)
    chosen: npt.NDArray[np.bool_] = parts == parts[np.unravel_index(int(strongest.argmax()), inside.shape)]
    return chosen
