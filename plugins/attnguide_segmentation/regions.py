"""The regions of a face: their names, the merging of other labels into them, and the resizing of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.errors import InputError, UnknownNameError
from attnguide.functional import may_read
from attnguide.masks import FACE_PARTS, face_parts

__all__ = ["PARTS", "REGIONS", "SCHEMES", "around_landmarks", "as_masks", "merged", "normalized", "resized"]

#: The seven regions of the method, in the order of its masks.
REGIONS: tuple[str, ...] = ("background", "hair", "face_skin", "eyes", "eyebrows", "mouth", "nose")
#: The small ones: their masks grow when they are made coarser, which keeps some of their surroundings.
PARTS: frozenset[str] = frozenset({"eyes", "eyebrows", "mouth", "nose"})

_HELEN = (
    "background", "face_skin", "eyebrows", "eyebrows", "eyes", "eyes", "nose", "mouth", "mouth", "mouth",
    "hair",
)  # fmt: skip

#: Meaning of the numbers in the label maps of data sets.
#: `helen`: background, face skin, left and right brow, left and right eye, nose, upper lip, inner mouth,
#: lower lip, hair; LaPa and `ProceduralFaces` have the same order. `celebamask`: the 19 labels of
#: CelebAMask-HQ in the order of its parts; ears, hats, jewellery, neck and clothes are background, and
#: glasses are ignored.
SCHEMES: dict[str, tuple[str, ...]] = {
    "regions": REGIONS,
    "helen": _HELEN,
    "lapa": _HELEN,
    "celebamask": (
        "background", "face_skin", "nose", "eyes", "eyes", "eyes", "eyebrows", "eyebrows", "background",
        "background", "mouth", "mouth", "mouth", "hair", "background", "background", "background",
        "background", "background",
    ),
}  # fmt: skip


def merged(labels: Tensor, scheme: str | Sequence[str] | Mapping[int, str] = "helen") -> Tensor:
    """Merge the labels of a data set into the seven regions.

    Args:
        labels: Labels, integers of any shape.
        scheme: Name in `SCHEMES`, or the region of each label.

    Returns:
        Indices into `REGIONS`, uint8, of the same shape.

    Raises:
        UnknownNameError: If the scheme or a region is unknown.
        InputError: If the labels are not integers, or one is not in the scheme; the message names it.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise UnknownNameError("scheme of labels", scheme, SCHEMES)
        scheme = SCHEMES[scheme]
    names = dict(scheme) if isinstance(scheme, Mapping) else dict(enumerate(scheme))
    for name in names.values():
        if name not in REGIONS:
            raise UnknownNameError("region", name, REGIONS)
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(f"labels are {labels.dtype}; a label map holds integers.")
    whole = labels.long()
    if may_read(whole):
        strange = set(torch.unique(whole).tolist()) - set(names)
        if strange:
            raise InputError(
                f"the label map holds {sorted(strange)[:5]}, but the labels are {min(names)} to "
                f"{max(names)}. Is it of another scheme?"
            )
    table = torch.zeros(max(names) + 1, dtype=torch.uint8)
    for number, name in names.items():
        table[number] = REGIONS.index(name)
    return table.to(labels.device)[whole]


def as_masks(regions: Tensor, count: int = len(REGIONS)) -> Tensor:
    """Convert regions of any accepted form to masks.

    Args:
        regions: A label map `(B, H, W)` of integers below `count`, or masks `(B, count, H, W)`, at least 0.
        count: Number of regions R.

    Returns:
        `(B, R, H, W)`, float32.

    Raises:
        InputError: If the shape is wrong, or a label is unknown.
    """
    if regions.ndim == 3 and not regions.is_floating_point():
        whole = regions.long()
        if may_read(whole) and whole.numel() and (int(whole.min()) < 0 or int(whole.max()) >= count):
            strange = sorted({value for value in torch.unique(whole).tolist() if not 0 <= value < count})
            raise InputError(
                f"the label map holds {strange[:5]}, but regions are 0 to {count - 1}: "
                f"{', '.join(REGIONS)}. Merge other labels with merged()."
            )
        # Compared, rather than one_hot: it makes no int64 tensor eight times as large.
        return (whole[:, None] == torch.arange(count, device=whole.device)[:, None, None]).float()
    if regions.ndim == 4 and regions.shape[1] == count:
        masks = regions.float()
        if may_read(masks) and not bool(((masks >= 0) & (masks <= 1 + 1e-3)).all()):
            raise InputError("region masks hold values outside of [0, 1], or NaN; give shares of each pixel.")
        return masks
    raise InputError(
        f"regions have shape {tuple(regions.shape)} and are {regions.dtype}: expected a label map (B, H, "
        f"W) of integers, or masks (B, {count}, H, W)."
    )


def around_landmarks(landmarks: Tensor | Sequence[Tensor | None], size: tuple[int, int]) -> Tensor:
    """Draw the regions around 68 landmarks, on photographs too; hair has no landmarks, and stays empty.

    Face skin ends at the eyebrows. What is outside the face, hair and forehead included, is background.

    Args:
        landmarks: The 68 points of 300-W (iBUG), `(B, 68, 2)`, x and y in pixels of the image; NaN, or −1,
            everywhere for a face without landmarks; or a list in which such a face is None.
        size: Size `(H, W)` of the images.

    Returns:
        Masks `(B, 7, H, W)` of 0 and 1, on the CPU; all zero for a face without landmarks.

    Raises:
        InputError: If the landmarks are not `(B, 68, 2)`, or some of a face are NaN or infinite.
    """
    parts = dict(zip(FACE_PARTS, face_parts(landmarks, size).unbind(dim=1), strict=True))
    smaller = torch.stack([parts[name] for name in FACE_PARTS if name != "face"]).amax(dim=0)
    # Without landmarks nothing is known, the background included.
    known = (parts["face"] + smaller).amax(dim=(1, 2), keepdim=True).clamp(max=1)
    face = torch.maximum(parts["face"], smaller)
    masks = {
        "background": known * (1 - face),
        "hair": torch.zeros_like(face),
        "face_skin": face - smaller,
        **parts,
    }
    return torch.stack([masks[name] for name in REGIONS], dim=1)


def resized(masks: Tensor, size: tuple[int, int], names: Sequence[str] = REGIONS) -> Tensor:
    """Resize masks: eyes, brows, mouth and nose by their maximum, which grows them; others by their mean.

    Args:
        masks: Masks `(B, R, H, W)`.
        size: Target size `(h, w)`.
        names: Names of the regions; small regions are known by name.

    Returns:
        `(B, R, h, w)`.
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    small = torch.tensor([name in PARTS for name in names], device=masks.device)
    return torch.where(
        small[:, None, None], F.adaptive_max_pool2d(masks, size), F.adaptive_avg_pool2d(masks, size)
    )


def normalized(masks: Tensor) -> Tensor:
    """Scale each mask to a sum of 1, `(B, R, h, w)`; an empty region stays zero."""
    total = masks.sum(dim=(-2, -1), keepdim=True)
    return masks / torch.where(total > 0, total, torch.ones_like(total))
