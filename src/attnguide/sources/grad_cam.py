"""The CAM family: features of a layer, weighted by the gradient of the class score."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from attnguide import functional
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["CAM", "GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM"]


class _GradientCAM(AttributionSource):
    """A map made of a layer's features and their gradients.

    Args:
        relu: Keep only the evidence for the class; without it the map is signed.
    """

    def __init__(self, *, relu: bool = True) -> None:
        self.relu = relu

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`.

        In training, a map without any evidence for its class does not become zeros, which could not be
        guided; see [`functional.rectify`][attnguide.functional.rectify].
        """
        maps = self.signed(trace, pairs)
        if not self.relu:
            return maps
        return functional.rectify(maps) if trace.differentiable else maps.relu()

    def signed(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps before rectification, `(N, h, w)`."""
        return self.combine(pairs.pick(trace.feature.spatial), trace.gradients(pairs))

    @abstractmethod
    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Combine features and gradients, both `(N, C, h, w)`, into signed maps `(N, h, w)`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(relu={self.relu})"


class GradCAM(_GradientCAM):
    """Grad-CAM; see [`functional.grad_cam`][attnguide.functional.grad_cam].

    Args:
        relu: Keep only the evidence for the class; without it the map is signed.
    """

    def signed(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps without a copy of the features for each class."""
        return trace.weigh(pairs, trace.mean_gradients(pairs))

    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Weight each channel by its mean gradient."""
        return functional.grad_cam(features, gradients, relu=False)


class CAM(GradCAM):
    """Class activation map (Zhou et al., CVPR 2016) with the evidence against a class, lifted to begin at 0.

    Where average pooling and one linear layer follow, the map is the weights of that layer times the
    features, up to a factor; elsewhere mean gradients take the place of the weights, as in Grad-CAM. Unlike
    Grad-CAM's, the map ranks positions without evidence too.
    """

    def __init__(self) -> None:
        super().__init__(relu=False)

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, at least 0."""
        maps = self.signed(trace, pairs)
        return maps - maps.amin(dim=(-2, -1), keepdim=True)

    def __repr__(self) -> str:
        return "CAM()"


class GradCAMPlusPlus(_GradientCAM):
    """Grad-CAM++; see [`functional.grad_cam_plus_plus`][attnguide.functional.grad_cam_plus_plus].

    Args:
        relu: Keep only the evidence for the class.
    """

    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Weight each channel by its positive gradients."""
        return functional.grad_cam_plus_plus(features, gradients, relu=False)


class LayerCAM(_GradientCAM):
    """LayerCAM; see [`functional.layer_cam`][attnguide.functional.layer_cam].

    Args:
        relu: Keep only the evidence for the class.
    """

    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Weight each position by its positive gradient."""
        return functional.layer_cam(features, gradients, relu=False)


class HiResCAM(_GradientCAM):
    """HiResCAM; see [`functional.hires_cam`][attnguide.functional.hires_cam].

    Args:
        relu: Keep only the evidence for the class; without it the map is signed.
    """

    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Multiply gradient and feature position by position."""
        return functional.hires_cam(features, gradients, relu=False)


class XGradCAM(_GradientCAM):
    """XGrad-CAM; see [`functional.xgrad_cam`][attnguide.functional.xgrad_cam].

    Args:
        relu: Keep only the evidence for the class; without it the map is signed.
    """

    def combine(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Weight each channel by its gradients where it is active."""
        return functional.xgrad_cam(features, gradients, relu=False)
