"""Drawn faces: an offline test bed with a chosen bias.

`ProceduralFaces` quickly draws any number of faces from a seed. Each has attributes, a segmentation,
landmarks and an expression, and any two attributes can be made to occur together with a chosen probability:
the bias that attribution-guided training is to remove.

    faces = ProceduralFaces(2000, cooccurrence={("lipstick", "heavy_makeup"): 0.98})
    image, attributes, segmentation, landmarks, expression = faces[0]
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from attnguide.data.procedural._attributes import ATTRIBUTES, EXPRESSIONS, PREVALENCE, AttributeModel
from attnguide.data.procedural._geometry import EXPRESSION_UNITS, Draws
from attnguide.data.procedural._painting import Scene, draw_face
from attnguide.errors import InputError, UnknownNameError

__all__ = [
    "ATTRIBUTES",
    "ATTRIBUTE_REGIONS",
    "EXPRESSIONS",
    "EXPRESSION_UNITS",
    "HELEN_LABELS",
    "PREVALENCE",
    "TEMPLATES",
    "FaceSample",
    "ProceduralFaces",
    "template",
]

#: Meaning of the labels 0 to 10 of a segmentation. Left and right are the subject's own.
HELEN_LABELS: tuple[str, ...] = (
    "background", "face_skin", "left_brow", "right_brow", "left_eye", "right_eye",
    "nose", "upper_lip", "inner_mouth", "lower_lip", "hair",
)  # fmt: skip

_LIPS = ("upper_lip", "lower_lip")
_EYES = ("left_eye", "right_eye")
_BROWS = ("left_brow", "right_brow")

#: Labels of the segmentation that show each attribute. Hat and earrings lie on the background, as in Helen,
#: which has no label for them.
ATTRIBUTE_REGIONS: dict[str, tuple[str, ...]] = {
    "lipstick": _LIPS,
    "heavy_makeup": ("face_skin",),
    "smiling": (*_LIPS, "inner_mouth"),
    "mouth_open": (*_LIPS, "inner_mouth"),
    "eyeglasses": (*_EYES, "face_skin"),
    "moustache": ("face_skin",),
    "goatee": ("face_skin",),
    "bushy_eyebrows": _BROWS,
    "earrings": ("background",),
    "pale_skin": ("face_skin", "nose"),
    "black_hair": ("hair",),
    "blond_hair": ("hair",),
    "brown_hair": ("hair",),
    "bald": ("hair", "face_skin"),
    "bangs": ("hair",),
    "hat": ("background", "hair"),
}

#: Regions of the aligned face, each a union of ellipses (centre x, centre y, radius x, radius y) in units of
#: the image side, as a user would paint them once for all faces.
TEMPLATES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "mouth": ((0.5, 0.765, 0.25, 0.15),),
    "eyes": ((0.365, 0.455, 0.155, 0.115), (0.635, 0.455, 0.155, 0.115)),
    "brows": ((0.365, 0.365, 0.165, 0.095), (0.635, 0.365, 0.165, 0.095)),
    "nose": ((0.5, 0.555, 0.11, 0.14),),
    "cheeks": ((0.315, 0.635, 0.14, 0.12), (0.685, 0.635, 0.14, 0.12)),
    "moustache": ((0.5, 0.685, 0.22, 0.085),),
    "chin": ((0.5, 0.915, 0.19, 0.11),),
    "ears": ((0.19, 0.56, 0.10, 0.16), (0.81, 0.56, 0.10, 0.16)),
    "forehead": ((0.5, 0.30, 0.30, 0.13),),
    "hair": ((0.5, 0.22, 0.45, 0.22), (0.13, 0.60, 0.16, 0.48), (0.87, 0.60, 0.16, 0.48)),
    "face": ((0.5, 0.56, 0.34, 0.43),),
}

_ATTRIBUTE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "lipstick": ("mouth",),
    "heavy_makeup": ("eyes", "cheeks"),
    "smiling": ("mouth",),
    "mouth_open": ("mouth",),
    "eyeglasses": ("eyes", "nose"),
    "moustache": ("moustache",),
    "goatee": ("chin",),
    "bushy_eyebrows": ("brows",),
    "earrings": ("ears",),
    "pale_skin": ("face",),
    "black_hair": ("hair",),
    "blond_hair": ("hair",),
    "brown_hair": ("hair",),
    "bald": ("hair", "forehead"),
    "bangs": ("forehead",),
    "hat": ("hair",),
}


class FaceSample(NamedTuple):
    """One face, or several faces with a leading batch dimension.

    A named tuple, so that it can be unpacked, collated, and passed through `torchvision.transforms.v2`.
    """

    image: Tensor
    """`tv_tensors.Image`, float32 (3, size, size) in [0, 1]."""
    attributes: Tensor
    """float32 (K,), 1 where an attribute is present, in the order of `ATTRIBUTES`."""
    segmentation: Tensor
    """`tv_tensors.Mask`, uint8 (size, size), an index into `HELEN_LABELS`."""
    landmarks: Tensor
    """`tv_tensors.KeyPoints`, float32 (68, 2): x and y in pixels, in iBUG (300-W) order; (0, 0) is the
    centre of the top left pixel."""
    expression: Tensor
    """int64 scalar, an index into `EXPRESSIONS`."""


class ProceduralFaces(Dataset[FaceSample]):
    """Drawn faces with exact labels and a controllable bias.

    Face `i` depends only on `seed`, `i` and the options other than `n`, to the pixel; the order of access and
    the number of workers do not matter. Everything that varies is drawn independently of the attributes, so
    two data sets that differ only in `force`, `cooccurrence` or `prevalence` show the same person in the same
    light, and only the parts that belong to the changed attributes differ.

    Attributes are independent by default, with these exceptions. Black, blond and brown hair and a bald head
    exclude each other (a head without any of them has grey or red hair); bangs need hair; and a face has the
    expression `happiness` if, and only if, it is `smiling`. Other expressions depend on whether the mouth is
    open: surprise and fear have an open mouth, sadness and disgust a closed one. An expression moves the face
    as its action units do (`EXPRESSION_UNITS`, with the numbers of the Facial Action Coding System).

    Left and right are the subject's own, so the right eye is on the left of the image. A flip moves the
    labels and landmarks, and does not rename them.

    Args:
        n: Number of faces.
        size: Side of the images in pixels, at least 32. The same face looks the same at any size.
        seed: Seed of the faces, at least 0.
        cooccurrence: Probability that the attributes of a pair agree: that both are present or
            both absent. Prevalences are kept. The pairs must form a forest.
        prevalence: Probability, for attributes, that they are present; others keep the default of
            `PREVALENCE`.
        transform: Applied to each whole `FaceSample`; `torchvision.transforms.v2` moves image,
            segmentation and landmarks together.
        force: Attributes to switch on or off in every face, after everything was drawn. Hair that is not
            allowed is drawn again among the allowed states.
        pose: Deviation of faces from the aligned position; 0 for none. At 1, up to 2.5 % of the image
            sideways, 9 % in scale, and 6 degrees.
        clutter: Share in [0, 1] of the shapes in the background that are drawn.
        noise: Standard deviation of the noisiest images' noise, in units of the image range.

    Raises:
        InputError: An argument is out of range, or the probabilities cannot be attained together; the
            message states the attainable range.
        UnknownNameError: An attribute does not exist.

    Example:
        >>> faces = ProceduralFaces(100, cooccurrence={("lipstick", "heavy_makeup"): 0.98})
        >>> faces[0].image.shape
        torch.Size([3, 64, 64])
    """

    classes: tuple[str, ...] = ATTRIBUTES
    """Names of the attributes, in order."""

    def __init__(
        self,
        n: int,
        size: int = 64,
        seed: int = 0,
        *,
        cooccurrence: Mapping[tuple[str, str], float] | None = None,
        prevalence: Mapping[str, float] | None = None,
        transform: Callable[[FaceSample], FaceSample] | None = None,
        force: Mapping[str, bool] | None = None,
        pose: float = 1.0,
        clutter: float = 0.6,
        noise: float = 0.02,
    ) -> None:
        self.n, self.seed = _at_least(n, 1, "n"), _at_least(seed, 0, "seed")
        self._scene = Scene(
            size=_at_least(size, 32, "size"),
            pose=_within(pose, 0.0, 3.0, "pose"),
            clutter=_within(clutter, 0.0, 1.0, "clutter"),
            noise=_within(noise, 0.0, 0.5, "noise"),
        )
        self.size = self._scene.size
        self.transform = transform
        model = AttributeModel(cooccurrence, prevalence, force)
        attributes, expressions = model.sample(self.n, self.seed)
        self._attributes, self._expressions = attributes, expressions.astype(np.uint8)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> FaceSample:
        """Draw one face.

        Args:
            index: Number of the face, from 0 to n-1, or from the end if negative.

        Raises:
            IndexError: There is no such face.
        """
        sample = self._draw(index)
        return sample if self.transform is None else self.transform(sample)

    def labels(self) -> Tensor:
        """Return the attributes of all faces, float32 (n, K), without drawing any."""
        return torch.from_numpy(self._attributes.astype(np.float32))

    def expressions(self) -> Tensor:
        """Return the expressions of all faces, int64 (n,), without drawing any."""
        return torch.from_numpy(self._expressions.astype(np.int64))

    def stack(self, indices: Iterable[int] | None = None) -> FaceSample:
        """Return several faces at once, each tensor with a leading dimension.

        Args:
            indices: Numbers of the faces; by default all of them.

        Raises:
            InputError: There are none, or the transform yields tensors of different shapes.
            IndexError: There is no such face.
        """
        samples = [self[i] for i in (range(self.n) if indices is None else indices)]
        if not samples:
            raise InputError("indices is empty; name at least one face.")
        image, attributes, segmentation, landmarks, expression = zip(*samples, strict=True)
        try:
            points = torch.stack([torch.as_tensor(p).as_subclass(Tensor) for p in landmarks])
            return FaceSample(
                tv_tensors.Image(torch.stack(image)),
                torch.stack(attributes),
                tv_tensors.Mask(torch.stack(segmentation)),
                tv_tensors.KeyPoints(points, canvas_size=tuple(image[0].shape[-2:])),
                torch.stack(expression),
            )
        except RuntimeError as error:
            raise InputError(
                f"the transformed faces do not stack: {error}. Let the transform give one size."
            ) from error

    def region_mask(self, name: str) -> Tensor:
        """Return `template(name, self.size)`."""
        return template(name, self.size)

    def _draw(self, index: int) -> FaceSample:
        i = operator.index(index)
        if not -self.n <= i < self.n:
            raise IndexError(f"there is no face {i}: the data set holds {self.n}.")
        i %= self.n
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, i])))
        draws = Draws._make(rng.random(len(Draws._fields)).tolist())
        row = self._attributes[i]
        has = dict(zip(ATTRIBUTES, row.tolist(), strict=True))
        expression = int(self._expressions[i])
        face = draw_face(draws, has, EXPRESSIONS[expression], self._scene, rng)
        return FaceSample(
            tv_tensors.Image(torch.from_numpy(face.image)),
            torch.from_numpy(row.astype(np.float32)),
            tv_tensors.Mask(torch.from_numpy(face.segmentation)),
            tv_tensors.KeyPoints(torch.from_numpy(face.landmarks), canvas_size=(self.size, self.size)),
            torch.tensor(expression),
        )


def template(name: str, size: int = 64) -> Tensor:
    """Return the mask of a region of the aligned face, as a user would paint it once for all faces.

    It is generous: it contains the region of nearly every face at the default `pose`.

    Args:
        name: A region, a key of `TEMPLATES`, or an attribute, for the regions that show it.
        size: Side of the mask in pixels, at least 1.

    Returns:
        float32 (size, size) of 0 and 1.

    Raises:
        UnknownNameError: There is neither a region nor an attribute of that name.
        InputError: `size` is less than 1.
    """
    size = _at_least(size, 1, "size")
    # "moustache" is both; the attribute's region is the region of that name.
    regions = (name,) if name in TEMPLATES else _ATTRIBUTE_TEMPLATES.get(name)
    if regions is None:
        raise UnknownNameError("region or attribute", name, [*TEMPLATES, *ATTRIBUTES])
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    mask = torch.zeros(size, size)
    for region in regions:
        for x, y, rx, ry in TEMPLATES[region]:
            inside = ((grid - x) / rx) ** 2 + ((grid[:, None] - y) / ry) ** 2 <= 1
            mask[inside] = 1
    return mask


def _at_least(value: int, least: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; give a whole number, at least {least}.") from None
    if number < least:
        raise InputError(f"{name} is {number}; it must be at least {least}.")
    return number


def _within(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; it must lie between {low:g} and {high:g}.")
    return float(value)
