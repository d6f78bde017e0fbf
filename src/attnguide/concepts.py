"""Deep feature factorisation: what the features of a layer have in common across images."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from attnguide import functional, visual
from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec
from attnguide.models.loaded_model import LoadedModel
from attnguide.models.preprocessing import Pictures
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["Concepts", "find_concepts"]


@dataclass(frozen=True)
class Concepts:
    """What the features of several images have in common.

    In a notebook it shows itself: each image, and beside it the concepts, each in a colour of its own.

    Attributes:
        maps: Where each of the K concepts is, `(B, K, h, w)`, at least 0, at the layer's resolution.
        vectors: Features of each concept, `(K, C)`.
        displayed: The images as RGB in [0, 1], `(B, 3, H, W)`.
        names: Name of each image; empty if tensors were given.
        layer: The layer.
    """

    maps: Tensor
    vectors: Tensor
    displayed: Tensor
    names: tuple[str, ...]
    layer: str

    def picture(self, *, cell: int = 224) -> Image.Image:
        """Draw each image and its concepts; at most 12 images.

        Args:
            cell: Side of an image in pixels.
        """
        from pytorch_grad_cam.utils.image import show_factorization_on_image

        count = len(self.vectors)
        colors = [colorsys.hsv_to_rgb(index / count, 0.85, 0.95) for index in range(count)]
        pictures: list[Image.Image | None] = []
        captions: list[str] = []
        for row in range(min(12, len(self.maps))):
            image = self.displayed[row].cpu()
            sized = functional.resize(self.maps[row], (image.shape[-2], image.shape[-1])).cpu()
            strongest = self.maps[row].amax().clamp(min=torch.finfo(sized.dtype).tiny)
            drawn = show_factorization_on_image(
                image.permute(1, 2, 0).numpy(), (sized / strongest).numpy(), colors, image_weight=0.4
            )
            pictures += [visual.to_pil(image), Image.fromarray(drawn)]
            captions += [self.names[row] if self.names else f"image {row}", f"{count} concepts"]
        return visual.contact_sheet(pictures, captions, columns=2, cell=cell, group=2)

    def show(self) -> None:
        """Show the picture: below the cell of a notebook, elsewhere in the system's viewer."""
        visual.show(self.picture())

    def _repr_png_(self) -> bytes:
        return visual.to_png(self.picture())

    def __repr__(self) -> str:
        return f"Concepts({len(self.vectors)} at {self.layer}, in {len(self.maps)} images)"


class _Features(AttributionSource):
    """Keeps the features of the layer; its maps are of no use."""

    needs_gradient = False

    def __init__(self) -> None:
        self.features = torch.empty(0)

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        self.features = trace.feature.spatial.detach()
        return self.features.new_zeros(len(pairs), *self.size(trace))


def find_concepts(
    model: nn.Module | LoadedModel,
    images: Tensor | Pictures,
    count: int = 5,
    layer: LayerSpec = "auto",
    **options: Any,
) -> Concepts:
    """Factorise the features of images into a few concepts (Collins et al., ECCV 2018).

    Features at all positions of all images, `(B·h·w, C)`, become a product of non-negative matrices: where
    each concept is, and what its features are. Concepts are shared by the images, so related images show
    more than a single one. Computed by pytorch-grad-cam and scikit-learn.

    Args:
        model: Any classifier.
        images: Tensors, files or PIL images, as for [`explain`][attnguide.explain].
        count: Number of concepts K.
        layer: Layer of the features.
        **options: `transform`, `measure` and `logits`, as for `explain`.

    Returns:
        The concepts.

    Raises:
        InputError: If the number of concepts is not at least 1, or pytorch-grad-cam or scikit-learn is
            missing.
    """
    if type(count) is not int or count < 1:
        raise InputError(f"count={count!r} must be a number of concepts, at least 1.")
    try:
        from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
    except ImportError as error:
        raise InputError("concepts need pytorch-grad-cam: pip install 'attnguide[grad-cam]'.") from error
    source = _Features()
    found = explain(model, images, source, layer=layer, **options)
    features = functional.full_precision(source.features).cpu().numpy()
    vectors, maps = dff(features.copy(), n_components=count)
    return Concepts(
        torch.from_numpy(maps.copy()).float(),
        torch.from_numpy(vectors.T.copy()).float(),
        found.displayed,
        found.names,
        found.layer,
    )
