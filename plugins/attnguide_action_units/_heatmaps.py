"""Draws heat maps of action units from landmarks, for a whole batch at once.

Each region is an ellipse in the coordinates of the face: the line between the outer eye corners is its x axis
and its unit of length. So a map follows the face through any shift, rotation and scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.functional import full_precision_mode
from attnguide_action_units.codebook import Region

__all__ = ["CHIN", "EYE_CORNERS", "Regions", "heat_maps"]

#: The outer corners of the eyes, the right one first: it is on the left of the image.
EYE_CORNERS = (36, 45)
CHIN = 8
#: A map fades from 1 to 0 between these distances from the centre, in radii of the ellipse.
_INSIDE, _OUTSIDE = 0.6, 1.4
#: Least number of cells on a side; coarser maps are averages, so that no region falls between two cells.
_FINEST = 56
#: Number of values that are computed at once: what fits a processor's cache, or fills an accelerator.
_AT_ONCE = {"cpu": 2**20, "other": 2**26}


class Regions:
    """Regions as tables of indices, to place them for many faces at once.

    Args:
        regions: R regions, at least one.
        device: Device of the tables.
    """

    def __init__(self, regions: Sequence[Region], device: torch.device) -> None:
        widest = max(len(region.points) for region in regions)
        padded = [(region.points + region.points[-1:] * widest)[:widest] for region in regions]
        shares = [
            [1 / len(region.points)] * len(region.points) + [0.0] * (widest - len(region.points))
            for region in regions
        ]
        self.points = torch.tensor(padded, device=device)  # (R, P)
        self.shares = torch.tensor(shares, device=device)  # (R, P), of a mean
        self.around = torch.tensor([region.kind == "around" for region in regions], device=device)[:, None]
        self.radii = torch.tensor([region.radii for region in regions], device=device)
        self.offset = torch.tensor([region.offset for region in regions], device=device)

    def __len__(self) -> int:
        return len(self.points)

    def place(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Place the regions on faces.

        Args:
            faces: Landmarks `(B, 68, 2)` in the coordinates of the face.

        Returns:
            Centres and half axes, both `(B, R, 2)`.
        """
        points = faces[:, self.points]  # (B, R, P, 2)
        low, high = points.amin(dim=2), points.amax(dim=2)
        mean = (points * self.shares[..., None]).sum(dim=2)
        centres = torch.where(self.around, (low + high) / 2, mean) + self.offset
        radii = torch.where(self.around, (high - low) / 2, 0.0) + self.radii
        return centres, radii


def heat_maps(
    landmarks: Tensor, regions: Regions, chosen: Tensor, size: tuple[int, int], image_size: tuple[int, int]
) -> Tensor:
    """Draw the chosen regions of each sample.

    A map is the maximum over its regions, with smooth edges, scaled to a maximum of 1. Landmarks get no
    gradient.

    Args:
        landmarks: `(B, 68, 2)`, x and y in pixels of the image; (0, 0) is the centre of the first pixel.
        regions: R regions.
        chosen: Indices of each sample's regions, `(B, r)`; an index may be repeated to fill a row.
        size: `(h, w)` of the maps.
        image_size: `(H, W)` of the image.

    Returns:
        `(B, h, w)` in [0, 1], float32.
    """
    # In full precision: squares of distances are differences of large numbers.
    with torch.no_grad(), full_precision_mode(landmarks.device):
        landmarks = landmarks.detach().float()
        finer = max(1, math.ceil(_FINEST / min(size)))
        fine = (size[0] * finer, size[1] * finer)
        forms = _quadratic_forms(landmarks, regions, chosen, image_size)
        monomials = _monomials(fine, image_size, landmarks.device)
        at_once = _AT_ONCE.get(landmarks.device.type, _AT_ONCE["other"])
        step = max(1, at_once // (forms.shape[1] * monomials.shape[1]))
        parts = []
        for part in torch.split(forms, step):
            # The edge falls off with the distance, so that the nearest region alone decides.
            squares = (part @ monomials).amin(dim=1).clamp_(min=0)
            away = squares.sqrt_().sub_(_INSIDE).div_(_OUTSIDE - _INSIDE).clamp_(0, 1)
            parts.append(1 - away * away * (3 - 2 * away))
        maps = torch.cat(parts) if parts else forms.new_zeros(0, fine[0] * fine[1])
        maps = maps.view(-1, 1, *fine)
        if finer > 1:
            maps = F.avg_pool2d(maps, finer)
        maps = maps[:, 0]
        return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _quadratic_forms(
    landmarks: Tensor, regions: Regions, chosen: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Squared distance from each region's centre in its radii, as a polynomial of the place, `(B, r, 6)`.

    The place is `(x, y)` in [−1, 1] over the image; the monomials are 1, x, y, x², xy, y².
    """
    right, left = landmarks[:, EYE_CORNERS[0]], landmarks[:, EYE_CORNERS[1]]
    origin, across = (right + left) / 2, left - right
    unit = across.norm(dim=1, keepdim=True).clamp(min=1e-6)
    cosine, sine = (across / unit).unbind(dim=1)
    # Rows: the axes of the face. A turn to the right goes from x, along the eyes, to y, towards the chin.
    axes = torch.stack([torch.stack([cosine, sine], 1), torch.stack([-sine, cosine], 1)], dim=1)
    faces = (landmarks - origin[:, None]) @ axes.transpose(1, 2) / unit[:, None]
    centres, radii = regions.place(faces)
    rows = torch.arange(len(chosen), device=chosen.device)[:, None]
    centres, radii = centres[rows, chosen], radii[rows, chosen]  # (B, r, 2)
    # In coordinates of the face a place p of the image is axes · (half · p + middle − origin) / unit.
    half = landmarks.new_tensor([image_size[1] / 2, image_size[0] / 2])
    slope = (axes * half / unit[:, None])[:, None] / radii[..., None]  # (B, r, 2, 2)
    shift = ((axes @ (half - 0.5 - origin)[..., None])[..., 0] / unit)[:, None]
    constant = (shift - centres) / radii  # (B, r, 2)
    x, y = slope.unbind(dim=3)
    terms = [constant * constant, 2 * constant * x, 2 * constant * y, x * x, 2 * x * y, y * y]
    return torch.stack([term.sum(dim=2) for term in terms], dim=2)


def _monomials(size: tuple[int, int], image_size: tuple[int, int], device: torch.device) -> Tensor:
    """The monomials 1, x, y, x², xy, y² at the centres of cells, `(6, h·w)`."""
    y, x = (
        (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (2 / cells) - 1 for cells in size
    )
    x, y = x.expand(size[0], -1).flatten(), y[:, None].expand(-1, size[1]).flatten()
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])
